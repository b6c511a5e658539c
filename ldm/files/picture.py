"""Pictures in files: which files they are, in which order, and how their bytes become upright sRGB pixels, or numbers in [-1, 1].

Pixel p in 0 ... 255 is p / 127.5 - 1. Libraries raise all kinds of exceptions for broken pictures; here each becomes a
ValueError.
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
from ldm.files.pointer import is_pointer

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")  # of the pictures in a folder
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # of a file that is named; of several pictures in one the first
MAX_PIXELS = 2**26  # a picture that claims more is refused before it is unpacked
MAX_PROFILE = 2**23  # bytes; a larger colour profile is passed over
NEAR_SRGB = 3  # of 255: profiles that change no colour by more than this are taken for sRGB
ASIDE = ("__MACOSX", "@eaDir")  # folders that archivers and storage servers fill with copies of their own
REQUEST = "request.json"  # what drawing writes beside its pictures, with these:
SHEET = re.compile(r"grid\.png|\d{5,}\..+\.png")  # of `ldm sample`, beside 00000.png
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
    """-> all files below a folder but hidden ones, relative to it, in natural order; a linked folder is entered once."""
    files, linked = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        links = {name: os.path.realpath(path) for name in folders if os.path.islink(path := os.path.join(place, name))}
        folders[:] = [name for name in folders if not is_hidden(name) and links.get(name) not in linked]
        linked |= set(links.values())
        files += [Path(place, name).relative_to(folder) for name in names if not is_hidden(name)]
    return sorted(files, key=natural)


def pictures_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """-> the pictures below a folder in natural order, and the counts of other files by ending, hidden ones left out."""
    files = files_in(folder)
    drawn = sheets(files)
    pictures = [file for file in files if is_picture(file) and file not in drawn]
    others = Counter(file.suffix.lower() or file.name for file in files if not is_picture(file))
    others += Counter({"sheets of ldm sample": len(drawn)})
    return [folder / file for file in pictures], others


def sheets(files: Sequence[Path]) -> set[Path]:
    """-> those of some files that `ldm sample` wrote beside the pictures it drew: grid.png, and maps such as 00000.edges.png."""
    folders = [{file.parent for file in files if file.name == name} for name in (REQUEST, "grid.png", "00000.png")]
    drawn = set.intersection(*folders)
    return {file for file in files if file.parent in drawn and SHEET.fullmatch(file.name)}


def left_out(where: str, others: Counter[str]) -> str:
    """-> a sentence about a folder's other files; `where` names the folder."""
    named = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common())
    return f"{where}: {others.total():,} files are left out, pictures end in {', '.join(ENDINGS)}: {named}"


def is_picture(file: Path) -> bool:
    """Whether a file counts as a picture: by its ending, unless it is hidden (macOS leaves `._cat.jpg`)."""
    return file.suffix.lower() in ENDINGS and not is_hidden(file.name)


def is_hidden(name: str) -> bool:
    """Whether a program made a file or folder of this name for itself: `._cat.jpg`, `.ipynb_checkpoints`, `__MACOSX`."""
    return name.startswith(".") or name in ASIDE


def natural(file: Path) -> list[tuple[list[str | int], str]]:
    """-> a sorting key by which 10.png comes behind 9.png; it is alphabetical where numbers have equally many digits."""
    parts = [[int(word) if i % 2 else word for i, word in enumerate(re.split(r"([0-9]+)", part))] for part in file.parts]
    return list(zip(parts, file.parts))


def open_picture(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Bytes -> a picture of which only the header is read.

    Raises:
        ValueError: it is of none of these formats, its header is broken, or it has more than MAX_PIXELS.
    """
    if is_pointer(data):
        raise Refusal("a pointer of Git LFS in the place of a picture: `git lfs pull` fetches that")
    with _faults(formats):
        image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise Refusal(f"{image.width} x {image.height} are more than the {MAX_PIXELS} pixels a picture may have")
    return image


def picture_size(data: bytes, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """Bytes -> width and height of the upright picture, from the header alone.

    Raises:
        ValueError: as `open_picture`.
    """
    image = open_picture(_without_pixels(data) if data.startswith(PNG) else data, formats)
    is_turned = image.format != "TIFF" and orientation(image) >= 5  # for a TIFF, Pillow gives the upright size
    return (image.height, image.width) if is_turned else image.size


def orientation(image: Image.Image) -> int:
    """-> EXIF's orientation, 1 to 8, by what has been read of the file; 1, upright, where there is none or an invalid one."""
    try:
        number = Image.Image.getexif(image).get(ORIENTATION, 1)  # that of the class PNG would unpack the pixels
    except Exception:  # whatever others wrote into the tags: the pixels do not depend on it
        return 1
    return number if isinstance(number, int) and number in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """-> the picture, its pixels read, turned as its EXIF orientation says.

    Raises:
        ValueError: they cannot be read.
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


def to_srgb(image: Image.Image, ground: str = "white") -> Image.Image:
    """-> the upright picture in mode RGB, converted to sRGB by its colour profile, with transparent parts over `ground`.

    A profile that cannot be read, or that is for other channels than the picture's, is ignored, as browsers do.

    Raises:
        ValueError: its pixels cannot be read, or are numbers without a known range.
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
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    """-> the upright picture in mode L, such as a mask; its transparency and its colour profile are ignored.

    Raises:
        ValueError: as `to_srgb`.
    """
    with _faults():
        return _base(upright(image))[0].convert("L")


def colour_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """-> the conversion of a picture's colours to sRGB; None where they are sRGB, or have no usable profile."""
    profile = image.info.get("icc_profile")
    return _transform(profile, _base_mode(image)) if profile and len(profile) <= MAX_PROFILE else None


def to_bytes(images: Tensor) -> Tensor:
    """(*) in [-1, 1] -> uint8 in 0 ... 255, (*), rounded."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8, (*) -> float32 in [-1, 1], (*), in the same memory layout."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of mode RGB -> uint8 (3, h, w), channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _base_mode(image: Image.Image) -> str:
    """-> the mode that a picture's colours are read in, without transparency: L, RGB or CMYK."""
    if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _base(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """-> the picture in that mode, and its opacity (mode L); None where it has no transparency."""
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
    """-> the perceptual conversion from a profile to sRGB; None where it changes no colour by more than NEAR_SRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        probe = Image.fromarray(_probe()[:, :, 0] if mode == "L" else _probe())
        moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    except Exception:  # a profile that LittleCMS does not take, or not for this mode
        return None
    return transform if np.abs(moved).max() > NEAR_SRGB else None


def _probe() -> np.ndarray:
    """-> colours on a grid, as a picture, uint8 (17 * 17, 17, 3)."""
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(17 * 17, 17, 3)


def _without_pixels(data: bytes) -> bytes:
    """A PNG's bytes -> the same without its pixels, with all chunks before and behind them.

    Raises:
        ValueError: it is cut off.
    """
    at, chunks = len(PNG), [PNG]
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if not kind or end > len(data):
            raise Refusal(f"a PNG that is cut off after {len(data)} bytes")
        chunks += [] if kind in PNG_PIXELS else [data[at:end]]
        at = end
    return b"".join([*chunks, struct.pack(">I4sI", 0, b"IDAT", 0x35AF061E)])


@contextmanager
def _faults(formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """A context in which whatever a reader of pictures raises becomes a ValueError, in words that broken files can share."""
    try:
        yield
    except UnidentifiedImageError as error:  # its words hold an address
        raise Refusal(f"no picture in {', '.join(formats)}") from error
    except ValueError:
        raise
    except Exception as error:
        raise Refusal(f"{type(error).__name__}: {error}") from error
