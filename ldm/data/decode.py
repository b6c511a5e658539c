"""Bytes of a shard's member to values, by a fixed table of member names. Nothing in a shard can name code to run.

jpg jpeg png webp    picture    uint8 (3, size, size)
map.png, map.*.png   label map  int64 (size, size), the numbers in the file
txt                  text       str
json                 record     dict
cls                  class      int
npy, *.npy           array      tensor; floats as float32
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 2**26  # a picture that claims more is refused before it is unpacked
FORMATS = ("JPEG", "PNG", "WEBP")
FAULTS = (OSError, ValueError, SyntaxError, EOFError, IndexError, RecursionError, struct.error, Image.DecompressionBombError)


def decode(member: str, data: bytes, size: int, where: str = "") -> Any:
    """One member's bytes -> its value, as the table above says; pictures have the shorter side brought to `size`, middle kept.

    Args:
        where: shard and key, for the error.

    Raises:
        ValueError: the bytes are not what the member's name says.
    """
    read = decoder(member)
    try:
        return read(data, size)
    except FAULTS as error:
        raise ValueError(f"Cannot read member {member!r} of {where or 'a sample'} ({len(data)} bytes): {error!r}") from error


def decoder(member: str) -> Callable[[bytes, int], Any]:
    """The function that reads members of this name.

    Raises:
        ValueError: no such member is ever read.
    """
    if re.fullmatch(r"map\.(.*\.)?png", member):
        return _label_map
    last = member.rpartition(".")[2].lower()
    if last not in _TABLE:
        raise ValueError(
            f"Members {member!r} are not read from shards; readable are those that end in {', '.join(_TABLE)} (data.fields)."
        )
    return _TABLE[last]


def is_image(member: str) -> bool:
    """Whether a member is a picture, (3, size, size) uint8."""
    return decoder(member) is _image


def is_text(member: str) -> bool:
    """Whether a member is text, such as a caption."""
    return decoder(member) is _text


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, what is transparent over white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _image(data: bytes, size: int) -> Tensor:
    image = ImageOps.exif_transpose(_open(data))
    image = _fit(to_rgb(image), size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _label_map(data: bytes, size: int) -> Tensor:
    image = _open(data)
    labels = np.array(_fit(image, size, Image.Resampling.NEAREST)).astype(np.int64)
    if labels.ndim != 2:
        raise ValueError(f"a label map has one channel of labels, this one has mode {image.mode}")
    return torch.from_numpy(labels)


def _text(data: bytes, size: int) -> str:
    return data.decode("utf-8").strip()


def _record(data: bytes, size: int) -> dict:
    record = json.loads(data)
    if not isinstance(record, dict):
        raise ValueError(f"wanted a JSON object, found {type(record).__name__}")
    return record


def _class(data: bytes, size: int) -> int:
    return int(data)


def _array(data: bytes, size: int) -> Tensor:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"wanted numbers, found an array of {array.dtype}")
    dtype = np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} are more than the {MAX_PIXELS} pixels a picture may have")
    return image


def _fit(image: Image.Image, size: int, how: Image.Resampling) -> Image.Image:
    """The middle square, size x size. Cropped before it is scaled, so that no shape, however long, fills the memory."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.crop(box) if side == size else image.resize((size, size), how, box=box)


_TABLE: dict[str, Callable[[bytes, int], Any]] = {
    "jpg": _image,
    "jpeg": _image,
    "png": _image,
    "webp": _image,
    "txt": _text,
    "json": _record,
    "cls": _class,
    "npy": _array,
}
