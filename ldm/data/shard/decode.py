"""Bytes of a shard's member to values, by a fixed table of member names. Nothing in a shard can name code to run.

jpg jpeg png webp    picture    uint8 (3, height, width)
map.png, map.*.png   label map  int64 (height, width), the numbers in the file
txt                  text       str
json                 record     dict
cls                  class      int
npy, *.npy           array      tensor of its own type
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ldm.errors import Refusal
from ldm.files.picture import colour_transform, open_picture, orientation, to_srgb, upright

MAX_BYTES = 2**28  # a member that is larger is refused before it is read
MAX_RECORD = 2**20  # a json or a text that is larger is refused
FORMATS = ("JPEG", "PNG", "WEBP")
JPEGS, SRGB_MODES = ("JPEG", "MPO"), ("RGB", "L")  # that simplejpeg reads, to the very pixels of Pillow's
BOM = b"\xef\xbb\xbf"


class BadSample(Refusal):
    """A sample that cannot be read, through no fault of the program."""


@dataclass(frozen=True)
class View:
    """What to cut out of a picture, and how large it becomes.

    Args:
        height, width: pixels of the result.
        v, u: in [0, 1], where the cut lies, 0 at the top or left, 0.5 in the middle.
        flip: mirrored.
    """

    height: int
    width: int
    v: float = 0.5
    u: float = 0.5
    flip: bool = False

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The largest cut of a picture that has the result's shape -> left, top, width and height in its pixels."""
        scale = min(width / self.width, height / self.height)
        w, h = min(width, round(self.width * scale)), min(height, round(self.height * scale))
        return int((width - w) * self.u), int((height - h) * self.v), max(w, 1), max(h, 1)

    def corner(self, width: int, height: int) -> tuple[int, int]:
        """Top and left of the cut once the picture is scaled: SDXL's crop (https://arxiv.org/abs/2307.01952, 2.2)."""
        left, top, w, h = self.box(width, height)
        return round(top * self.height / h), round(left * self.width / w)


def decode(member: str, data: bytes, view: View, where: object = "a sample", out: np.ndarray | None = None) -> Any:
    """One member's bytes -> its value, as the table above says.

    Args:
        member: its name, whose ending says what it is.
        data: its bytes.
        view: what of a picture is looked at.
        where: shard and key, for the error.
        out: uint8 (height, width, 3), where a picture may be laid; the result then shares its memory, or does not.

    Raises:
        BadSample: the bytes are not what the member's name says.
    """
    read = decoder(member)
    try:
        if len(data) > MAX_BYTES:
            raise Refusal(f"more than the {MAX_BYTES} bytes that a member may have")
        return read(data, view, out)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"Cannot read member {member!r} of {where} ({len(data)} bytes): {error!r}") from error


@cache
def decoder(member: str) -> Callable[[bytes, View, np.ndarray | None], Any]:
    """The function that reads members of this name.

    Raises:
        Refusal: no such member is ever read.
    """
    if re.fullmatch(r"map\.(.*\.)?png", member):
        return _label_map
    last = member.rpartition(".")[2].lower()
    if last not in _TABLE:
        raise Refusal(
            f"Members {member!r} are not read from shards; readable are those that end in {', '.join(_TABLE)} (data.fields)."
        )
    return _TABLE[last]


def is_image(member: str) -> bool:
    """Whether a member is a picture, (3, height, width) uint8."""
    return member.rpartition(".")[2].lower() in _TABLE and decoder(member) is _image


def is_array(member: str) -> bool:
    """Whether a member is an array of numbers."""
    return decoder(member) is _array


def is_text(member: str) -> bool:
    """Whether a member is text, such as a caption."""
    return decoder(member) is _text


def is_alike(member: str, other: str) -> bool:
    """Whether a member, of any name, is read as another one is that can be read."""
    return member.rpartition(".")[2].lower() in _TABLE and decoder(member) is decoder(other)


def decode_picture(data: bytes, view: View, out: np.ndarray | None = None, formats: Sequence[str] = FORMATS) -> Tensor:
    """-> uint8 (3, height, width), channels last, upright, in sRGB.

    Raises:
        Refusal: no picture of these formats that can be read.
    """
    image = open_picture(data, formats)
    as_it_is = image.size == (view.width, view.height) and not view.flip
    return _fit(_pixels(image, data, out if as_it_is else None), view, InterpolationMode.BICUBIC)


def cut_picture(image: Image.Image, view: View) -> Tensor:
    """A picture that is read already -> uint8 (3, height, width), channels last, upright, in sRGB.

    Raises:
        Refusal: its pixels cannot be read, or are numbers of no known range.
    """
    return _fit(np.array(to_srgb(image)), view, InterpolationMode.BICUBIC)


def _image(data: bytes, view: View, out: np.ndarray | None) -> Tensor:
    return decode_picture(data, view, out)


def _pixels(image: Image.Image, data: bytes, out: np.ndarray | None) -> np.ndarray:
    """-> uint8 (H, W, 3), in `out` where it has this shape and the picture is a plain JPEG."""
    plain = image.format in JPEGS and image.mode in SRGB_MODES
    if plain and orientation(image) == 1 and colour_transform(image) is None:
        try:
            return decode_jpeg(data, buffer=np.empty((image.height, image.width, 3), np.uint8) if out is None else out)
        except ValueError:
            pass  # Pillow says whether what it stumbles over matters
    return np.array(to_srgb(image))


def _label_map(data: bytes, view: View, out: np.ndarray | None) -> Tensor:
    image = upright(open_picture(data, FORMATS))
    labels = np.array(image).astype(np.int64)
    if labels.ndim != 2:
        raise Refusal(f"a label map has one channel of labels, this one has mode {image.mode}")
    return _fit(labels[..., None], view, InterpolationMode.NEAREST_EXACT)[0]


def _text(data: bytes, view: View, out: np.ndarray | None) -> str:
    if len(data) > MAX_RECORD:
        raise Refusal(f"more than the {MAX_RECORD} bytes that a text may have")
    return data.removeprefix(BOM).decode("utf-8").strip()


def _record(data: bytes, view: View, out: np.ndarray | None) -> dict:
    if len(data) > MAX_RECORD:
        raise Refusal(f"more than the {MAX_RECORD} bytes that a record may have")
    record = json.loads(data)
    if not isinstance(record, dict):
        raise Refusal(f"wanted a JSON object, found {type(record).__name__}")
    return record


def _class(data: bytes, view: View, out: np.ndarray | None) -> int:
    number = int(data.removeprefix(BOM))
    if not -(2**63) <= number < 2**63:
        raise Refusal("a class is a number of at most 64 bits")
    return number


def _array(data: bytes, view: View, out: np.ndarray | None) -> Tensor:
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        if array.dtype.kind in "fiub":
            return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except Exception as error:  # whatever a broken header leads NumPy to: its parser, its types, memory that is not there
        raise Refusal(f"no array in NumPy's format: {type(error).__name__}: {error}") from error
    raise Refusal(f"wanted numbers, found an array of {array.dtype}")


def _fit(pixels: np.ndarray, view: View, how: InterpolationMode) -> Tensor:
    """(H, W, C) -> (C, height, width). Cut before it is scaled, so that no shape, however long, fills the memory."""
    left, top, w, h = view.box(pixels.shape[1], pixels.shape[0])
    image = torch.from_numpy(np.ascontiguousarray(pixels[top : top + h, left : left + w])).permute(2, 0, 1)
    if (h, w) != (view.height, view.width):
        image = resize(image, [view.height, view.width], how, antialias=how is InterpolationMode.BICUBIC)
    return image.flip(2) if view.flip else image


_TABLE: dict[str, Callable[[bytes, View, np.ndarray | None], Any]] = {
    "jpg": _image,
    "jpeg": _image,
    "png": _image,
    "webp": _image,
    "txt": _text,
    "json": _record,
    "cls": _class,
    "npy": _array,
}
