"""What the index keeps of each sample of a shard: where its members lie, its sizes, and the numbers of its record."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ldm.data.shard.decode import FORMATS, MAX_RECORD, is_image
from ldm.data.shard.tar import Damaged, Spans, read_headers
from ldm.files.picture import picture_size

HASHES = ("sha256", "sha512", "md5")
SIZES = ("width", "height", "original_width", "original_height")
# Columns of the index that are no number of a record, and words that data.filters has for others.
OWN = ("key", "hash", "caption_length", "side", "original_side", "aspect", "unique", "complete", "missing")
HEAD = 2**15  # bytes of a picture that mostly hold its size
MOST = 64  # numbers that are kept of a record


def describe(path: str | Path) -> pa.Table:
    """The index of one shard, a row a sample (see index.py for the columns).

    Raises:
        Damaged: the shard is.
    """
    samples = read_headers(path)
    columns: dict[str, pa.Array] = {"key": pa.array(list(samples), pa.string())}
    for member in sorted({m for members in samples.values() for m in members}):
        spans = np.array([members.get(member, (-1, 0)) for members in samples.values()], dtype=np.int64)
        columns |= {f"{member}:offset": pa.array(spans[:, 0]), f"{member}:size": pa.array(spans[:, 1])}
    with open(path, "rb") as file:
        records = records_of(Path(path), file.fileno(), samples)
        columns |= _numbers(file.fileno(), samples, records)
        columns["caption_length"] = pa.array(_caption_lengths(file.fileno(), samples))
    columns["hash"] = pa.array([_hash(record) for record in records], pa.uint64())
    return pa.table(columns)


def records_of(path: Path, file: int, samples: Spans) -> list[Mapping[str, Any]]:
    """Each sample's json, and over it what is known in its row of the Parquet file beside the shard.

    Raises:
        Damaged: that file cannot be read, or names none of the samples.
    """
    records = [_parse(file, members) for members in samples.values()]
    beside = path.with_suffix(".parquet")
    if not beside.is_file():
        return records
    try:
        table = pq.read_table(beside).to_pylist()
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise Damaged(f"has a {beside.name} that cannot be read: {error}") from error
    named = [str(row.get("key")) for row in table]
    rows, keys = dict(zip(named, table)), [key.rpartition("/")[2] for key in samples]
    if samples and not rows.keys() & set(keys):
        raise Damaged(f"has a {beside.name} whose column `key` names none of its samples; remove it, or give it their keys")
    if twice := {key for key, count in Counter(named).items() if count > 1} & set(keys):
        raise Damaged(f"has a {beside.name} with {len(twice)} keys of several rows, such as {min(twice)}; keep one row of each")
    additions = [rows.get(key, {}) for key in keys]
    return [record | {k: v for k, v in row.items() if v is not None and v == v} for record, row in zip(records, additions)]


def apart(name: str, reserved: Sequence[str], others: Iterable[str] = ()) -> str:
    """A column's name, another one where it is one of our own, in any case, that is none of `others` either; half of a surrogate
    pair, which JSON may spell and no file can hold, is written out.
    """
    name = name.encode("utf-8", "backslashreplace").decode()
    while name.lower() in reserved or ":" in name:
        name = f"source_{name}".replace(":", "_")
        while name in others:
            name = f"source_{name}"
    return name


def _parse(file: int, members: Mapping[str, tuple[int, int]]) -> Mapping[str, Any]:
    offset, size = members.get("json", (0, 0))
    if not 0 < size <= MAX_RECORD:
        return {}
    try:
        record = json.loads(os.pread(file, size, offset))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _numbers(file: int, samples: Spans, records: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    names = list(dict.fromkeys(name for record in records for name, value in record.items() if is_number(value)))
    names = list(dict.fromkeys((*SIZES, *names)))[:MOST]
    columns = {apart(name, OWN, names): name for name in names}
    table = {c: np.array([number(record.get(name)) for record in records], dtype=np.float64) for c, name in columns.items()}
    for row, members in enumerate(samples.values()):
        if math.isnan(table["width"][row]) or math.isnan(table["height"][row]):
            table["width"][row], table["height"][row] = _measure(file, members)
    for side in ("width", "height"):  # a picture that nobody resized
        table[f"original_{side}"] = np.where(np.isnan(table[f"original_{side}"]), table[side], table[f"original_{side}"])
    return {name: pa.array(values) for name, values in table.items()}


def _measure(file: int, members: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
    """The size in the header of the sample's picture -> width, height; NaN where there is none."""
    for member, (offset, size) in members.items():
        if is_image(member):
            for length in (min(HEAD, size), size):
                try:
                    return picture_size(os.pread(file, length, offset), FORMATS)
                except ValueError:
                    continue
    return math.nan, math.nan


def _caption_lengths(file: int, samples: Spans) -> Iterable[int]:
    spans = [members.get("txt") for members in samples.values()]
    return [-1 if s is None else len(os.pread(file, s[1], s[0]).decode("utf-8-sig", "replace").strip()) for s in spans]


def _hash(record: Mapping[str, Any]) -> int:
    for name in HASHES:
        try:
            return int(str(record[name])[:16], 16) % 2**64
        except (KeyError, ValueError):
            continue
    return 0


def is_number(value: Any) -> bool:
    """Whether the index has a column for what a record says; true and false are 1 and 0."""
    return isinstance(value, int | float)


def number(value: Any) -> float:
    """-> it as the index keeps it; NaN where it is none, or too large."""
    return float(value) if is_number(value) and abs(value) < 2**1000 else math.nan
