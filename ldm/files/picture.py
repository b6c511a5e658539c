"""Pictures in files: which files they are, in which order, and how their bytes become upright sRGB pixels, or numbers in [-1, 1].

Readers of pictures raise whatever a file leads them to; here each such fault is a ValueError, and nothing else leaves.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from ldm.errors import Refusal

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")  # of the pictures in a folder
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # of a file that is named; of several pictures in one the first
MAX_PIXELS = 2**26  # a picture that claims more is refused before it is unpacked
MAX_PROFILE = 2**23  # bytes; a larger colour profile is passed over
NEAR_SRGB = 3  # of 255: profiles that move no colour further than this are sRGB in other words
ASIDE = ("__MACOSX", "@eaDir")  # folders that archivers and storage servers fill with copies of their own
ORIENTATION = 0x0112  # of EXIF
ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow keeps it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IDAT", b"fdAT", b"acTL", b"fcTL")  # chunks that say nothing of the picture's size or orientation


def files_in(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, relative to it, in natural order; a linked folder is gone into once."""
    found, linked = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        links = {name: os.path.realpath(path) for name in folders if os.path.islink(path := os.path.join(place, name))}
        folders[:] = [name for name in folders if not is_hidden(name) and links.get(name) not in linked]
        linked |= set(links.values())
        found += [Path(place, name).relative_to(folder) for name in names if not is_hidden(name)]
    return sorted(found, key=natural)


def pictures_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """-> the pictures below a folder in natural order, and how many other files there are, by ending (hidden ones apart)."""
    files = files_in(folder)
    others = Counter(file.suffix.lower() or file.name for file in files if not is_picture(file))
    return [folder / file for file in files if is_picture(file)], others


def left_out(where: str, others: Counter[str]) -> str:
    """What to say of a folder's other files."""
    named = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common())
    return f"{where}: {others.total():,} files are left out, pictures end in {', '.join(ENDINGS)}: {named}"


def is_picture(file: Path) -> bool:
    """Whether a file of a folder is taken for a picture: by its ending, and not hidden (macOS leaves `._cat.jpg`)."""
    return file.suffix.lower() in ENDINGS and not is_hidden(file.name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of such a name is none of a person's own: `._cat.jpg`, `.ipynb_checkpoints`, `__MACOSX`."""
    return name.startswith(".") or name in ASIDE


def natural(file: Path) -> list[tuple[list[str | int], str]]:
    """What to sort by, so that 10.png comes behind 9.png; equal to the alphabet where numbers have equally many digits."""
    parts = [[int(word) if i % 2 else word for i, word in enumerate(re.split(r"([0-9]+)", part))] for part in file.parts]
    return list(zip(parts, file.parts))


def open_picture(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """A picture of which no more than the header is read.

    Raises:
        Refusal: none of these formats, a broken header, or more than MAX_PIXELS.
    """
    with _faults(formats):
        image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise Refusal(f"{image.width} x {image.height} are more than the {MAX_PIXELS} pixels a picture may have")
    return image


def picture_size(data: bytes, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """-> width and height as it is looked at, from the header alone.

    Raises:
        Refusal: no picture.
    """
    image = open_picture(_without_pixels(data) if data.startswith(PNG) else data, formats)
    lies = image.format != "TIFF" and orientation(image) >= 5  # Pillow tells a TIFF's size as it is looked at
    return (image.height, image.width) if lies else image.size


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8, as far as it has been read; 1, upright, where there is none or one that cannot be understood."""
    try:
        told = Image.Image.getexif(image).get(ORIENTATION, 1)  # that of the class PNG would unpack the pixels
    except Exception:  # whatever others wrote into the tags: the pixels do not depend on it
        return 1
    return told if isinstance(told, int) and told in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The picture as it is looked at, its pixels read.

    Raises:
        Refusal: they cannot be read.
    """
    with _faults():
        image.load()
        turn = TURNS.get(orientation(image))
        if turn is None:
            return image
        image = image.transpose(turn)
        for name in ORIENTED:
            image.info.pop(name, None)
        return image


def to_srgb(image: Image.Image) -> Image.Image:
    """Any picture, upright -> mode RGB, its colours brought to sRGB by the profile it carries, what is transparent over white.

    A profile that cannot be read, or is of other channels than the picture's, is passed over, as browsers do.

    Raises:
        Refusal: its pixels cannot be read, or are numbers of no known range.
    """
    with _faults():
        image = upright(image)
        transform = colour_transform(image)
        image, alpha = _base(image)
        image = transform.apply(image) if transform else image.convert("RGB")
        image.info.clear()  # of what it was: profile, transparency, EXIF
        if alpha is None:
            return image
        image.putalpha(alpha)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    """Any picture, upright -> mode L, such as a mask; its transparency and its profile are passed over.

    Raises:
        Refusal: its pixels cannot be read, or are numbers of no known range.
    """
    with _faults():
        return _base(upright(image))[0].convert("L")


def colour_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """What brings a picture's colours to sRGB; None where they are, or where nothing is known of them."""
    profile = image.info.get("icc_profile")
    return _transform(profile, _base_mode(image)) if profile and len(profile) <= MAX_PROFILE else None


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, h, w) in [-1, 1] -> uint8, rounded: the picture as a file holds it."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 -> float32 of the same shape and layout in [-1, 1]."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of mode RGB -> uint8 (3, h, w), channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _base_mode(image: Image.Image) -> str:
    """The mode that a picture's colours are read in, transparency apart."""
    if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _base(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """-> the picture in that mode, and its transparency (mode L)."""
    if image.mode in ("I", "F", "LAB"):
        raise Refusal(f"a picture of mode {image.mode}: numbers of no known range, wanted grey, RGB or CMYK of 8 or 16 bits")
    if image.mode.startswith("I;16"):
        grey, clear = np.asarray(image), image.info.get("transparency")
        alpha = None if clear is None else Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8))
        return Image.fromarray((grey >> 8).astype(np.uint8)), alpha
    base = _base_mode(image)
    if not image.has_transparency_data:
        return image.convert(base), None
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))  # whose colours are multiplied
    image = image.convert("LA" if base == "L" else "RGBA")
    return image.convert(base), image.getchannel("A")


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB, perceptually; None where that moves none further than NEAR_SRGB."""
    try:
        told = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(told, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        probe = Image.fromarray(_probe()[:, :, 0] if mode == "L" else _probe())
        moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    except Exception:  # a profile that LittleCMS does not take, or not for this mode
        return None
    return transform if np.abs(moved).max() > NEAR_SRGB else None


def _probe() -> np.ndarray:
    """Colours on a grid, as a picture, uint8 (17 * 17, 17, 3); each of the channels takes all its values."""
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(17 * 17, 17, 3)


def _without_pixels(data: bytes) -> bytes:
    """A PNG with all that it says before and behind its pixels, and none of them.

    Raises:
        Refusal: it is cut off.
    """
    at, told = len(PNG), [PNG]
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if not kind or end > len(data):
            raise Refusal(f"a PNG that is cut off after {len(data)} bytes")
        told += [] if kind in PNG_PIXELS else [data[at:end]]
        at = end
    return b"".join([*told, struct.pack(">I4sI", 0, b"IDAT", 0x35AF061E)])


@contextmanager
def _faults(formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Whatever a reader of pictures raises becomes a ValueError, in words that two broken files can share."""
    try:
        yield
    except UnidentifiedImageError as error:  # its words hold an address
        raise Refusal(f"no picture in {', '.join(formats)}") from error
    except ValueError:
        raise
    except Exception as error:
        raise Refusal(f"{type(error).__name__}: {error}") from error
