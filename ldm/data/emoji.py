"""The data set that ships with the project: 3,655 emoji with Unicode's names, at any resolution.

`prepare_data` writes them once as tar shards, laid out as img2dataset would: 000000000.jpg (white behind), .txt (the name) and
.json; also .cls (the group's number) and .map.png (a label map: 0 nothing there, else 1 + the nearest colour of PALETTE).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards
from ldm.errors import NotFound, Refusal
from ldm.files.content import file_content

ASSETS = Path(__file__).parent / "assets"
VERSION = 1  # of what is written below; a new one writes new shards
CELL = 64  # pixels of a picture in the atlas
SPLIT = {"train": False, "val": True}

CLASSES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
DEFAULT_GROUPS = tuple(name for name in CLASSES if name not in ("People & Body", "Symbols", "Flags"))

# sRGB; label i + 1 in a label map means colour i.
PALETTE = {
    "black": (40, 40, 40),
    "grey": (144, 150, 155),
    "white": (245, 245, 245),
    "red": (230, 55, 45),
    "orange": (255, 150, 20),
    "yellow": (252, 200, 45),
    "green": (85, 160, 60),
    "blue": (50, 140, 215),
    "purple": (150, 70, 175),
    "brown": (125, 80, 60),
}


class Emoji(Shards):
    """Emoji as shards, written below `root` at first.

    Args:
        root: folder for the shards; they go into a folder of their own there, named after size and contents.
        size: pixels.
        groups: names out of CLASSES, "all", or None for all but "People & Body", "Symbols" and "Flags".
        val_fraction: share of the pictures kept for validation, chosen by a hash of the key; 0 keeps none.
        shards: as in Shards.

    Raises:
        NotFound: the atlas is not there.
        ValueError: there is no such group.
    """

    def __init__(
        self,
        root: str | Path = "runs/data",
        size: int = 32,
        groups: Sequence[str] | Literal["all"] | None = None,
        val_fraction: float = 0.05,
        **shards: Any,
    ) -> None:
        self.groups, self.val_fraction = _choose(groups), val_fraction
        self.folder = Path(root) / f"emoji-{size}-{_name(size, self.groups, val_fraction)}"
        val = self.folder / "val" if val_fraction > 0 else None
        super().__init__(self.folder / "train", val, size=size, **shards)

    def prepare_data(self) -> None:
        """Writes the shards, unless they are there, and indexes them."""
        for split, held_out in SPLIT.items():
            if (held_out and self.val is None) or (self.folder / split).exists():
                continue
            try:
                write_shards(self._samples(held_out), self.folder / split, per_shard=10_000)
            except FileExistsError:
                pass  # another process wrote them meanwhile
        super().prepare_data()

    def _samples(self, held_out: bool) -> Iterator[dict[str, Any]]:
        atlas = Image.open(_asset("emoji.webp"), formats=("WEBP",)).convert("RGBA")
        columns = atlas.width // CELL
        for i, row in enumerate(_rows()):
            key = f"{i:09d}"  # img2dataset: shard number * 10,000 + row, and these are one shard's
            if row["group"] not in self.groups or _in_val(key, self.val_fraction) != held_out:
                continue
            x, y = i % columns * CELL, i // columns * CELL
            picture = atlas.crop((x, y, x + CELL, y + CELL)).resize((self.size, self.size), Image.Resampling.LANCZOS)
            yield _sample(key, row, picture)


def label_map(picture: Image.Image) -> np.ndarray:
    """RGBA picture -> uint8 (H, W): 0 where alpha is below 128, else 1 + the number of PALETTE's nearest colour."""
    pixels, colours = np.asarray(picture).astype(np.float32), np.array(list(PALETTE.values()), dtype=np.float32)
    distance = (colours**2).sum(1) - 2 * pixels[..., :3] @ colours.T  # less |pixel|^2; whole numbers, exact in float32
    return np.where(pixels[..., 3] >= 128, 1 + distance.argmin(-1), 0).astype(np.uint8)


def _sample(key: str, row: dict[str, str], picture: Image.Image) -> dict[str, Any]:
    white = Image.new("RGBA", picture.size, "white")
    jpg = io.BytesIO()
    Image.alpha_composite(white, picture).convert("RGB").save(jpg, "JPEG", quality=95, subsampling=0)
    png = io.BytesIO()
    Image.fromarray(label_map(picture)).save(png, "PNG")
    record = {
        "caption": row["name"],
        "url": f"NotoColorEmoji.ttf#{row['codepoints'].replace(' ', '-')}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": picture.width,
        "height": picture.height,
        "original_width": CELL,
        "original_height": CELL,
        "exif": "{}",
        "sha256": hashlib.sha256(jpg.getvalue()).hexdigest(),
        "group": row["group"],
        "subgroup": row["subgroup"],
        "codepoints": row["codepoints"],
    }
    members = {"jpg": jpg.getvalue(), "txt": row["name"], "json": record}
    return {"__key__": key, **members, "cls": CLASSES.index(row["group"]), "map.png": png.getvalue()}


def _choose(groups: Sequence[str] | str | None) -> tuple[str, ...]:
    """-> the groups' names, in the order of CLASSES."""
    if groups is None:
        return DEFAULT_GROUPS
    wanted = CLASSES if groups == "all" else [groups] if isinstance(groups, str) else list(groups)
    unknown = [name for name in wanted if name not in CLASSES]
    if unknown or not wanted:
        raise Refusal(f"data.groups={groups!r} names no group of emoji; wanted `all` or a list out of {', '.join(CLASSES)}.")
    return tuple(name for name in CLASSES if name in wanted)


def _name(size: int, groups: Sequence[str], val_fraction: float) -> str:
    """-> 8 hex digits that differ where the shards would."""
    assets = [file_content(_asset(name)) for name in ("emoji.webp", "emoji.csv")]
    words = json.dumps([VERSION, size, list(groups), val_fraction, PALETTE, *assets])
    return hashlib.sha256(words.encode()).hexdigest()[:8]


def _in_val(key: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < fraction * 2**32


def _rows() -> list[dict[str, str]]:
    with _asset("emoji.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.is_file():
        raise NotFound(
            f"{path} is missing, the pictures that `data=emoji` is made of. It comes with the project: install the package "
            "anew, or `git checkout` it; `python tools/build_emoji.py` builds it again."
        )
    return path
