"""Pictures into shards:  python -m ldm.data.pack SOURCE OUT [--size 512] [--val 0.05]

SOURCE is a folder of pictures, each perhaps with a caption beside it (cat.jpg, cat.txt); a folder of class sub-folders; or a
.csv, .tsv or .jsonl whose rows name a picture and its caption. OUT becomes a folder of shards (OUT/train and OUT/val with
--val). What does not go in is named, or counted where it is no picture.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm.data.write import write_shards
from ldm.files.picture import ENDINGS, colour_transform, files_in, is_picture, open_picture, orientation, to_srgb, upright

TABLES = (".csv", ".tsv", ".jsonl")
PICTURES = ("file_name", "image", "path", "file", "filename", "image_path", "url")  # columns that name a picture
CAPTIONS = ("caption", "text", "prompt", "title")
QUALITY = 95


@dataclass
class Packed:
    """What went into the shards, and what did not: pictures by name with the reason, other files by their ending."""

    counts: Counter[str] = field(default_factory=Counter)  # of "train" and "val"; "silent", those of them without a caption
    classes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 0 where every picture was packed, 1 where some could not be read, 2 where there was nothing to pack."""
    asked = _parser().parse_args(arguments)
    packed = Packed()
    try:
        pack(Path(asked.source), Path(asked.out), asked.size, asked.per_shard, asked.val, packed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for path, why in packed.skipped.items():
            print(f"left out: {path}: {why}", file=sys.stderr)
    _say(packed)
    where = f"data.train={asked.out}/train data.val={asked.out}/val" if asked.val else f"data.train={asked.out}"
    print(f"The shards are in {asked.out}; train on them with data=shards {where}")
    return 1 if packed.skipped else 0


def pack(source: Path, out: Path, size: int | None, per_shard: int, val: float, packed: Packed) -> None:
    """Writes shards, and into `packed` what it did.

    A sample holds jpg (the file's own bytes where it is an upright JPEG and `size` is None), txt (its caption, or its class'
    name), json (width, height, original_width, original_height, sha256, and a table's other numbers and words), and cls where
    there are class sub-folders.

    Args:
        size: pixels that the shorter side is brought down to; None keeps it.
        val: the share that is held out, chosen by a hash of the picture: one that is there twice is on one side.

    Raises:
        ValueError: no pictures, none that can be read, or a table without the columns that it needs.
        FileNotFoundError: the source is not there.
        FileExistsError: the shards are.
    """
    rows = find(source, packed)
    if not rows:
        raise ValueError(f"No pictures in {source}: looked for {', '.join(ENDINGS)}, or a {', '.join(TABLES)} that names some.")
    packed.classes = sorted({row["class"] for row in rows if "class" in row})
    held_out = _held_out(rows, val) if val else set()

    def samples(split: str) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(tqdm(rows, desc=f"packing {split}", unit="picture")):
            if (number in held_out) == (split == "val") and (sample := _sample(row, packed, size)):
                packed.counts[split] += 1
                packed.counts["silent"] += not sample["txt"]
                yield {"__key__": f"{number:09d}", **sample}
        if not packed.counts[split]:
            raise ValueError(f"None of the pictures for {split} can be read.")

    write_shards(samples("train"), out / "train" if val else out, per_shard)
    if val:
        write_shards(samples("val"), out / "val", per_shard)
    if packed.classes:
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in packed.classes), encoding="utf-8")


def find(source: Path, packed: Packed) -> list[dict[str, Any]]:
    """The pictures of a source, each with its file and, where there is one, `caption`, `class`, `fault` and other columns."""
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}.")
    if source.is_file():
        return _table(source)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (source / name).is_file():
            return _table(source / name)
    names = files_in(source)
    pictures = [name for name in names if is_picture(name)]
    captions = {name.with_suffix(".txt") for name in pictures} & set(names)
    packed.passed_over.update(name.suffix or name.name for name in sorted({*names} - {*pictures} - captions))
    in_classes = len({name.parts[0] for name in pictures}) > 1 and all(len(name.parts) > 1 for name in pictures)
    return [_row(source, name, in_classes and not captions) for name in pictures]


def _row(source: Path, name: Path, in_classes: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"file": source / name, "name": str(name)}
    if in_classes:
        return row | {"class": name.parts[0], "caption": name.parts[0].replace("_", " ")}
    beside = row["file"].with_suffix(".txt")
    try:
        return row | {"caption": beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else ""}
    except UnicodeDecodeError:
        return row | {"fault": f"its caption {beside.name} is not UTF-8"}


def _table(path: Path) -> list[dict[str, Any]]:
    lines = _lines(path)
    columns = {str(name).lower(): name for line in lines if isinstance(line, dict) for name in line}
    picture = next((columns[name] for name in PICTURES if name in columns), None)
    caption = next((columns[name] for name in CAPTIONS if name in columns), None)
    if picture is None or caption is None:
        raise ValueError(
            f"{path} has the columns {', '.join(columns) or 'none'}; wanted one that names the picture ({', '.join(PICTURES)}) "
            f"and one with its caption ({', '.join(CAPTIONS)})."
        )
    return [_entry(path, number, line, picture, caption) for number, line in enumerate(lines, 1)]


def _lines(path: Path) -> list[Any]:
    """The rows of a table: dicts, or what else stands in their place."""
    if path.suffix not in TABLES:
        raise ValueError(f"{path} is no table of captions: wanted a folder, or a {', '.join(TABLES)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [_value(line) for line in text.split("\n") if line.strip()]
        header = text.partition("\n")[0]
        return list(csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table in UTF-8: {error}") from error


def _entry(path: Path, number: int, line: Any, picture: str, caption: str) -> dict[str, Any]:
    if not isinstance(line, dict) or not isinstance(line.get(picture), str) or not line[picture]:
        return {"name": f"row {number} of {path.name}", "fault": f"it names no {picture}"}
    row = {k: _value(v) for k, v in line.items() if k not in (picture, caption)}
    row |= {"file": path.parent / line[picture], "name": line[picture]}
    if not isinstance(line.get(caption), str | None):
        return row | {"fault": f"its {caption} is no text, but {line[caption]!r}"}
    return row | {"caption": (line.get(caption) or "").strip()}


def _value(cell: Any) -> Any:
    """A cell of a table, as a number where it is one."""
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell


def _held_out(rows: Sequence[Mapping[str, Any]], val: float) -> set[int]:
    """The numbers of those held out, at least one."""
    digests = {}
    for number, row in enumerate(tqdm(rows, desc="choosing val", unit="picture")):
        if "fault" not in row and row["file"].is_file():
            digests[number] = hashlib.sha256(row["file"].read_bytes()).digest()
    least = min(digests.values(), default=b"")
    chosen = {n for n, digest in digests.items() if digest == least or int.from_bytes(digest[:4], "big") < val * 2**32}
    if len(chosen) == len(digests):
        raise ValueError(f"--val {val} leaves none of {len(digests)} pictures to train on.")
    return chosen


def _sample(row: Mapping[str, Any], packed: Packed, size: int | None) -> dict[str, Any] | None:
    """A sample, or None, with the reason in `packed`."""
    if "fault" in row:
        packed.skipped[row["name"]] = row["fault"]
        return None
    try:
        data = row["file"].read_bytes()
        jpg, numbers = _jpeg(data, size)
    except (OSError, ValueError) as error:
        packed.skipped[row["name"]] = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        return None
    rest = {k: v for k, v in row.items() if k not in ("file", "name", "class") and _is_told(v)}
    record = {**rest, "url": row["name"], "status": "success", **numbers, "sha256": hashlib.sha256(data).hexdigest()}
    sample = {"jpg": jpg, "txt": row["caption"], "json": record}
    return sample | ({"cls": packed.classes.index(row["class"])} if "class" in row else {})


def _is_told(value: Any) -> bool:
    """Whether a record can hold it: JSON knows no number that is none."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _say(packed: Packed) -> None:
    counts = packed.counts
    held_out = f", {counts['val']:,} of them held out" if counts["val"] else ""
    print(f"{counts['train'] + counts['val']:,} pictures{held_out}; {counts['silent']:,} without a caption")
    if packed.classes:
        shown = ", ".join(packed.classes[:8]) + (", ..." if len(packed.classes) > 8 else "")
        print(f"{len(packed.classes):,} classes, by sub-folder: {shown}")
    if packed.passed_over:
        print("passed over: " + ", ".join(f"{n:,} {ending}" for ending, n in packed.passed_over.most_common()))


def _jpeg(data: bytes, size: int | None) -> tuple[bytes, dict[str, int]]:
    """-> the picture as an upright RGB JPEG in sRGB, and its sizes in pixels."""
    image = open_picture(data)
    as_it_is = image.format == "JPEG" and image.mode == "RGB" and orientation(image) == 1 and not colour_transform(image)
    image = upright(image)
    original = {"original_width": image.width, "original_height": image.height}
    shrink = size / min(image.size) if size else 1.0
    if as_it_is and shrink >= 1:
        return data, {"width": image.width, "height": image.height, **original}
    image = to_srgb(image)
    if shrink < 1:
        image = image.resize((round(image.width * shrink), round(image.height * shrink)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue(), {"width": image.width, "height": image.height, **original}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ldm.data.pack", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder of pictures, of class sub-folders, or a .csv, .tsv or .jsonl")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument(
        "--size", type=_count, default=None, help="pixels the shorter side is brought down to; as it is by default"
    )
    parser.add_argument("--per-shard", type=_count, default=1000, help="samples of a shard")
    parser.add_argument("--val", type=_share, default=0.0, help="share of the pictures held out for validation")
    return parser


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; wanted at least 1")
    return int(text)


def _share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; wanted a share in [0, 1)")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
