"""What a person names on the command line, pictures, masks, label maps and numbers, as tensors of the size asked for."""

import colorsys
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import NotFound, Refusal
from ldm.files.picture import ENDINGS, from_bytes, left_out, open_picture, pictures_in, to_grey, to_srgb, to_tensor, upright


def files(field: str, values: Sequence[Any]) -> list[Path | Image.Image]:
    """Paths of files, or of folders, whose pictures are taken in natural order -> the pictures' paths; PIL's stay as they are.

    Raises:
        NotFound: one is not there, or a folder holds no pictures.
    """
    pictures: list[Path | Image.Image] = []
    for one in values:
        if isinstance(one, Image.Image):
            pictures.append(one)
            continue
        path = Path(str(one))
        inside, others = pictures_in(path) if path.is_dir() else ([path], {})
        if not inside or not inside[0].is_file():
            raise NotFound(f"ask.{field}={path}: there is no such picture, or folder with pictures ({', '.join(ENDINGS)}).")
        if others:
            warn(left_out(f"ask.{field}={path}", others), stacklevel=2)
        pictures += inside
    return pictures


def read_pictures(field: str, values: Sequence[Any], size: tuple[int, int], ground: str = "white") -> Tensor:
    """Files -> (N, 3, height, width) in [-1, 1], cropped in the middle to the shape of `size`, then scaled.

    ground: the colour below what is transparent.
    """
    pictures = []
    for path in files(field, values):
        image = _open(field, path, partial(to_srgb, ground=ground))
        pictures.append(to_tensor(ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)))
    return from_bytes(torch.stack(pictures))


def read_centred(field: str, values: Sequence[Any], side: int) -> Tensor:
    """Files -> (N, 3, side, side) in [-1, 1]: the shorter side scaled to `side`, then the middle cut out, as CLIPs see them."""
    pictures = []
    for path in files(field, values):
        image = _open(field, path, to_srgb)
        width, height = (max(side, int(side * length / min(image.size))) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        pictures.append(to_tensor(image))
    return from_bytes(torch.stack(pictures))


def read_greys(field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Files -> (N, 1, height, width) in [0, 1], white is 1."""
    greys = [ImageOps.fit(_open(field, p, to_grey), size[::-1], Image.Resampling.BILINEAR) for p in files(field, values)]
    return torch.stack([torch.from_numpy(np.array(grey)).float()[None] / 255 for grey in greys])


def read_masks(field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Files, white (at least 128) where to repaint -> (N, 1, height, width) of 0 and 1, scaled by nearest.

    Raises:
        Refusal: a mask that is empty or full.
    """
    masks = []
    for path in files(field, values):
        grey = np.array(ImageOps.fit(_open(field, path, to_grey), size[::-1], Image.Resampling.NEAREST))
        if (grey >= 128).all() or (grey < 128).all():
            what = "full: nothing of the picture is known" if grey[0, 0] >= 128 else "empty: nothing is to be repainted"
            raise Refusal(
                f"ask.{field}={path} is {what}. White (at least 128) is repainted, black is kept, and it holds {grey.min()} to "
                f"{grey.max()}; perhaps it is inverted."
            )
        masks.append(torch.from_numpy(grey >= 128).float()[None])
    return torch.stack(masks)


def shrunk(field: str, values: Sequence[Any], size: tuple[int, int]) -> float:
    """How many times larger than `size` the largest of some files is, once it has its shape."""
    sizes = [_open(field, path).size for path in files(field, values)]
    return max(min(width / size[1], height / size[0]) for width, height in sizes)


def check_shapes(values: Mapping[str, Sequence[Any]], a: str, b: str) -> None:
    """Raises ValueError where the files of the fields a and b, one by one, are of different shapes."""
    ours, others = ([(path, _open(field, path).size) for path in files(field, values[field])] for field in (a, b))
    for _, (one, (w, h)), (other, (w2, h2)) in zip(range(max(len(ours), len(others))), cycle(ours), cycle(others)):
        if abs(w * h2 - w2 * h) > max(w, h, w2, h2):  # a pixel, once they are of one height or width
            second = f"{b}={other}" if b == "init" else f"ask.{b}={other}"
            raise Refusal(
                f"ask.{a}={one} is {w}x{h} and {second} is {w2}x{h2}: they are cut in the middle, each for itself, and so would "
                "not lie on each other. Give both the same shape."
            )


def read_maps(field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Files of one channel, or with a palette, the labels as numbers -> (N, height, width) integers, scaled by nearest.

    Raises:
        Refusal: a picture with colours instead of labels.
    """
    maps = []
    for path in files(field, values):
        image = _open(field, path)
        if image.mode not in ("L", "P", "1", "I", "I;16"):
            raise Refusal(
                f"ask.{field}={path} is a picture of mode {image.mode}; a label map has one channel, and its numbers are labels."
            )
        maps.append(torch.from_numpy(np.array(ImageOps.fit(image, size[::-1], Image.Resampling.NEAREST)).astype(np.int64)))
    return torch.stack(maps)


def numbers(field: str, values: Sequence[Any], low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Numbers, perhaps as words -> (N).

    Raises:
        Refusal: no number, or one that is not from `low` to `high`.
    """
    try:
        parsed = [float(a) for a in values]
    except (TypeError, ValueError):
        parsed = [math.nan]
    if not all(low <= value <= high for value in parsed):
        wanted = "numbers" if high == math.inf else f"numbers from {low:g} to {high:g}"
        raise Refusal(f"ask.{field}={', '.join(map(str, values))}: wanted {wanted}.")
    return torch.tensor(parsed)


def painted(labels: Tensor, count: int) -> Tensor:
    """labels: (B, h, w) integers in [0, count) -> (B, 3, h, w) in [-1, 1], white for 0, else hues as far apart as can be."""
    return torch.tensor(_hues(count))[labels.cpu()].permute(0, 3, 1, 2).mul(2).sub(1)


def palette(count: int) -> tuple[str, ...]:
    """The colours of `painted`, as CSS writes them: #rrggbb."""
    return tuple("#" + "".join(f"{round(255 * part):02x}" for part in hue) for hue in _hues(count))


def numbered(count: int) -> tuple[str, ...]:
    """The names of labels that have none."""
    return tuple(map(str, range(count)))


def _hues(count: int) -> list[tuple[float, float, float]]:
    return [(1.0, 1.0, 1.0), *(colorsys.hsv_to_rgb(i / max(count - 1, 1), 0.8, 0.9) for i in range(count - 1))]


def _open(field: str, path: Path | Image.Image, read: Callable[[Image.Image], Image.Image] = upright) -> Image.Image:
    try:
        return read(path if isinstance(path, Image.Image) else open_picture(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise Refusal(f"ask.{field}={path} is no whole picture: {error}") from error
