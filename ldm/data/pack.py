"""Pictures into shards:  python -m ldm.data.pack SOURCE OUT [--size 512] [--val 0.05]

SOURCE is a folder of pictures, each perhaps with a caption beside it (cat.jpg, cat.txt); a folder of class sub-folders; or a
.csv or .jsonl whose rows name a picture and its caption. OUT becomes a folder of shards (OUT/train and OUT/val with --val).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from ldm.data.decode import FAULTS, FORMATS, MAX_PIXELS, to_rgb
from ldm.data.write import write_shards

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
PICTURES = ("file_name", "image", "path", "file", "filename", "image_path", "url")  # columns that name a picture
CAPTIONS = ("caption", "text", "prompt", "title")
QUALITY = 95


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 0 where every picture was packed, 1 where some could not be read, 2 where there was nothing to pack."""
    asked = _parser().parse_args(arguments)
    try:
        skipped = pack(Path(asked.source), Path(asked.out), asked.size, asked.per_shard, asked.val)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, why in skipped.items():
        print(f"left out: {path}: {why}", file=sys.stderr)
    where = f"data.train={asked.out}/train data.val={asked.out}/val" if asked.val else f"data.train={asked.out}"
    print(f"The shards are in {asked.out}; train on them with data=shards {where}")
    return 1 if skipped else 0


def pack(source: Path, out: Path, size: int | None = None, per_shard: int = 1000, val: float = 0.0) -> dict[str, str]:
    """Writes shards; -> the pictures that could not be read, and why.

    A sample holds jpg (the file's own bytes where it is an upright JPEG and `size` is None), txt (its caption, or its class'
    name), json (width, height, original_width, original_height, sha256), and cls where there are class sub-folders. The share
    `val` is held out, chosen by a hash of the picture.

    Args:
        size: pixels that the shorter side is brought down to; None keeps it.

    Raises:
        ValueError: no pictures, or a table without the columns that it needs.
        FileNotFoundError: the source is not there.
        FileExistsError: the shards are.
    """
    rows = find(source)
    if not rows:
        raise ValueError(f"No pictures in {source}: looked for {', '.join(ENDINGS)}, or a .csv or .jsonl that names some.")
    classes = sorted({row["class"] for row in rows if "class" in row})
    skipped: dict[str, str] = {}

    def samples(held_out: bool) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(tqdm(rows, desc="packing val" if held_out else "packing", unit="picture")):
            if _in_val(row["file"], val) == held_out:
                sample = _sample(row, classes, size, skipped)
                if sample:
                    yield {"__key__": f"{number:09d}", **sample}

    if not val:
        write_shards(samples(False), out, per_shard)
    else:
        write_shards(samples(False), out / "train", per_shard)
        write_shards(samples(True), out / "val", per_shard)
    if classes:
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return skipped


def find(source: Path) -> list[dict[str, Any]]:
    """The pictures of a source, each with its file and, where there is one, `caption`, `class` and other columns."""
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}.")
    if source.is_file():
        return _table(source)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (source / name).is_file():
            return _table(source / name)
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    in_classes = bool(files) and all(file.parent != source for file in files)
    captioned = any(file.with_suffix(".txt").is_file() for file in files)
    return [_row(file, source, in_classes and not captioned) for file in files]


def _row(file: Path, source: Path, in_classes: bool) -> dict[str, Any]:
    beside = file.with_suffix(".txt")
    name = file.relative_to(source).parts[0]
    row: dict[str, Any] = {"file": file, "name": str(file.relative_to(source))}
    if in_classes:
        return row | {"class": name, "caption": name.replace("_", " ")}
    return row | {"caption": beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""}


def _table(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()] if path.suffix == ".jsonl" else list(csv.DictReader(file))
    columns = {str(name).lower(): name for name in (lines[0] if lines else {})}
    picture = next((columns[name] for name in PICTURES if name in columns), None)
    caption = next((columns[name] for name in CAPTIONS if name in columns), None)
    if picture is None or caption is None:
        raise ValueError(
            f"{path} has the columns {', '.join(columns) or 'none'}; wanted one that names the picture ({', '.join(PICTURES)}) "
            f"and one with its caption ({', '.join(CAPTIONS)})."
        )
    rest = [{k: _value(v) for k, v in line.items() if k not in (picture, caption)} for line in lines]
    return [
        {
            **more,
            "file": path.parent / str(line[picture]),
            "name": str(line[picture]),
            "caption": str(line[caption] or "").strip(),
        }
        for line, more in zip(lines, rest)
    ]


def _value(cell: Any) -> Any:
    """A cell of a table, as a number where it is one."""
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell


def _sample(row: Mapping[str, Any], classes: Sequence[str], size: int | None, skipped: dict[str, str]) -> dict[str, Any] | None:
    try:
        data = Path(row["file"]).read_bytes()
        jpg, numbers = _jpeg(data, size)
    except FAULTS as error:
        skipped[row["name"]] = f"{type(error).__name__}: {error}"
        return None
    rest = {k: v for k, v in row.items() if k not in ("file", "name", "class") and isinstance(v, str | int | float)}
    record = {**rest, "url": row["name"], "status": "success", **numbers, "sha256": hashlib.sha256(data).hexdigest()}
    sample = {"jpg": jpg, "txt": row["caption"], "json": record}
    return sample | ({"cls": classes.index(row["class"])} if "class" in row else {})


def _jpeg(data: bytes, size: int | None) -> tuple[bytes, dict[str, int]]:
    """-> the picture as an upright RGB JPEG, and its sizes in pixels."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} are more than the {MAX_PIXELS} pixels a picture may have")
    as_it_is = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
    image = ImageOps.exif_transpose(image)
    image.load()
    original = {"original_width": image.width, "original_height": image.height}
    shrink = size / min(image.size) if size else 1.0
    if as_it_is and shrink >= 1:
        return data, {"width": image.width, "height": image.height, **original}
    image = to_rgb(image)
    if shrink < 1:
        image = image.resize((round(image.width * shrink), round(image.height * shrink)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue(), {"width": image.width, "height": image.height, **original}


def _in_val(file: Path, fraction: float) -> bool:
    name = os.fsencode(Path(file).name)
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") < fraction * 2**32


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ldm.data.pack", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder of pictures, of class sub-folders, or a .csv or .jsonl")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--size", type=int, default=None, help="pixels the shorter side is brought down to; as it is by default")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples of a shard")
    parser.add_argument("--val", type=float, default=0.0, help="share of the pictures held out for validation")
    return parser


if __name__ == "__main__":
    sys.exit(main())
