"""Pictures into shards:  python -m ldm pack SOURCE OUT [--size 512] [--val 0.05]

SOURCE is a folder of pictures, each perhaps with a caption beside it (cat.jpg, cat.txt); a folder of class sub-folders; or a
.csv, .tsv, .jsonl, .json or .parquet whose rows name a picture and its caption. OUT becomes a folder of shards (OUT/train and
OUT/val with --val). Every picture and row becomes a sample, or is named with the reason; every other file is counted. At the end
stand the commands that train on the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm.data.batch.cut import CROP
from ldm.data.packing.gather import find
from ldm.data.packing.packed import Packed, Row, commands, found, say, say_left_out
from ldm.data.packing.table import ENDINGS, TABLES
from ldm.data.shard.decode import MAX_RECORD
from ldm.data.shard.record import OWN, apart
from ldm.data.shard.write import write_shards
from ldm.errors import Refusal
from ldm.files.content import file_content
from ldm.files.folder import write_text
from ldm.files.picture import colour_transform, open_picture, orientation, to_srgb, upright

KEYS = ("caption", "url", "status", "width", "height", "original_width", "original_height", "sha256", *CROP)  # of a record
QUALITY = 95


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 0 where every picture was packed, 1 where some could not be read, 2 where there was nothing to pack."""
    options = _parser().parse_args(arguments)
    packed = Packed()
    try:
        pack(Path(options.source), Path(options.out), options.size, options.per_shard, options.val, packed)
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        say_left_out(packed)
    say(packed)
    print(f"The shards are in {options.out}; these train on them, one after the other (docs/data.md):")
    print("\n".join(commands(packed, Path(options.out), bool(options.val))))
    return 1 if packed.skipped else 0


def pack(source: Path, out: Path, size: int | None, per_shard: int, val: float, packed: Packed) -> None:
    """Writes shards, and into `packed` what it did.

    A sample holds jpg (the file's own bytes where it is an upright JPEG and `size` is None), txt (its caption, or its class'
    name), json (the KEYS that pack knows, and what its row or record says; columns of such names are renamed), and cls, the
    number of its class, where sub-folders are classes.

    Args:
        source: a folder, or a table.
        out: the folder of the shards.
        size: pixels that the shorter side is brought down to; None keeps it.
        val: the share that is held out, chosen by a hash of the picture: one that is there twice is on one side.
        per_shard: samples of a shard, at most.
        packed: counts what was done.

    Raises:
        Refusal: no pictures, none that can be read, a table that cannot be read in one way only, or several splits.
        FileNotFoundError: the source is not there.
        AlreadyThere: the shards are.
    """
    rows = find(source, packed)
    if not rows:
        looked = f"looked for {', '.join(ENDINGS)}, or a {', '.join(TABLES)} that names some"
        raise Refusal(f"No pictures in {source}: {looked}.{found(packed)}")
    held_out = _held_out(rows, val) if val else set()

    def samples(split: str) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(tqdm(rows, desc=f"packing {split}", unit="picture")):
            if (number in held_out) == (split == "val") and (sample := _sample(row, packed, size)):
                packed.counts[split] += 1
                packed.counts["silent"] += not sample["txt"]
                yield {"__key__": f"{number:09d}", **sample}
        if not packed.counts[split]:
            raise Refusal(f"None of the pictures for {split} can be read.")

    write_shards(samples("train"), out / "train" if val else out, per_shard)
    if val:
        write_shards(samples("val"), out / "val", per_shard)
    if packed.classes:
        named = {number: name for name, number in packed.classes.items()}
        lines = (f"{' '.join(named.get(number, '').splitlines())}\n" for number in range(max(named) + 1))  # line i: class i
        write_text("".join(lines), out / "classes.txt")


def _held_out(rows: Sequence[Row], val: float) -> set[int]:
    """The numbers of those held out, at least one."""
    digests = {}
    for number, row in enumerate(tqdm(rows, desc="choosing val", unit="picture")):
        if not row.fault and row.file.is_file():
            digests[number] = bytes.fromhex(file_content(row.file))
    least = min(digests.values(), default=b"")
    chosen = {n for n, digest in digests.items() if digest == least or int.from_bytes(digest[:4], "big") < val * 2**32}
    if len(chosen) == len(digests):
        raise Refusal(f"--val {val} leaves none of {len(digests)} pictures to train on.")
    return chosen


def _sample(row: Row, packed: Packed, size: int | None) -> dict[str, Any] | None:
    """A sample, or None, with the reason in `packed`."""
    try:
        if row.fault:
            raise Refusal(row.fault)
        data = _read(row.file)
        jpg, numbers = _jpeg(data, size, packed)
        record = {"url": row.name, "status": "success", **numbers, "sha256": hashlib.sha256(data).hexdigest()}
        record = {**_columns(row, packed), "caption": row.caption, **record}
        for member, text in (("caption", row.caption), ("record", json.dumps(record))):
            if len(text.encode()) > MAX_RECORD:
                raise Refusal(f"its {member} has more than {MAX_RECORD} bytes")
    except (OSError, ValueError) as error:
        packed.skipped.append((row.name, f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)))
    else:
        packed.sides[min(numbers["width"], numbers["height"])] += 1
        sample = {"jpg": jpg, "txt": row.caption, "json": record}
        return sample if row.label is None else sample | {"cls": packed.classes[row.label]}
    return None


def _read(file: Path) -> bytes:
    if file.exists() and not file.is_file():
        raise Refusal("no file, but a folder, pipe or device")
    return file.read_bytes()


def _columns(row: Row, packed: Packed) -> dict[str, Any]:
    """What a table or a record beside the picture says, under names that are none of our own."""
    columns: dict[str, Any] = {}
    for name, value in row.columns.items():
        new = apart(name, (*OWN, *KEYS), row.columns)
        if new != name:
            packed.renamed[name] = new
        try:
            json.dumps(value, allow_nan=False)
            columns[new] = value
        except (ValueError, TypeError, RecursionError):
            packed.dropped[name] += 1
    return columns


def _jpeg(data: bytes, size: int | None, packed: Packed) -> tuple[bytes, dict[str, int]]:
    """-> the picture as an upright RGB JPEG in sRGB, and its sizes in pixels."""
    image = open_picture(data)
    several = _is_several(image)
    as_it_is = image.format == "JPEG" and image.mode == "RGB" and orientation(image) == 1 and not colour_transform(image)
    image = upright(image)
    original = {"original_width": image.width, "original_height": image.height}
    shrink = size / min(image.size) if size else 1.0
    if as_it_is and shrink >= 1:
        return data, {"width": image.width, "height": image.height, **original}
    image = to_srgb(image)
    if shrink < 1:
        image = image.resize((round(image.width * shrink), round(image.height * shrink)), Image.Resampling.LANCZOS)
    packed.counts["frames"] += several
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue(), {"width": image.width, "height": image.height, **original}


def _is_several(image: Image.Image) -> bool:
    """Whether a picture has frames or pages; of a camera's MPO the first is the picture."""
    try:
        return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    except Exception:  # whatever stands in the place of the next frame: the first does not depend on it
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ldm pack", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder of pictures, of class sub-folders, or a .csv, .tsv, .jsonl, .json or .parquet")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument(
        "--size", type=_count, default=None, help="pixels the shorter side is brought down to; as it is by default"
    )
    parser.add_argument("--per-shard", type=_count, default=1000, help="samples of a shard")
    parser.add_argument("--val", type=_share, default=0.0, help="share of the pictures held out for validation")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; wanted a whole number of at least 1")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text}; wanted a share in [0, 1)")
    return share
