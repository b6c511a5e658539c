"""Clean shards of damaged ones: every sample that can be read whole, and the names of the others."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.data.shard.decode import BadSample, View, decode, decoder
from ldm.data.shard.index import Index
from ldm.data.shard.record import records_of
from ldm.data.shard.tar import Damaged, read_headers, salvage
from ldm.data.shard.write import write_shard
from ldm.errors import AlreadyThere
from ldm.files.folder import read_json, write_json

SOURCE, LOST = "repair-of.json", "left-out.txt"  # beside the shards


def claim(out: Path, index: Index, fields: dict[str, str]) -> None:
    """Says what a folder of clean shards is for, or makes sure that it is for this.

    Raises:
        AlreadyThere: it is there, and for something else.
    """
    wanted = {"shards": _all_shards(index), "fields": fields}
    if out.exists():
        source = read_json(out / SOURCE) if (out / SOURCE).is_file() else None
        if source != wanted:
            raise AlreadyThere(f"{out} is there already, and no repair of these shards; remove it, or write to another folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(wanted, out / SOURCE)


def repair(index: Index, fields: dict[str, str], out: Path) -> tuple[int, int]:
    """Writes a clean shard for each one, with every sample of it that can be read whole; goes on where it stopped.

    -> how many samples there are in `out`, and how many it says why they are not.
    """
    for number, shard in enumerate(tqdm(_all_shards(index), desc="repairing", unit="shard")):
        path, lost = out / f"{number:05d}.tar", dict[str, str]()
        if path.is_file():
            continue
        whole = _readable(Path(index.fetch(shard)), fields, lost)
        if first := next(whole, None):
            write_shard(itertools.chain([first], whole), path)
        with (out / LOST).open("a", encoding="utf-8") as file:
            file.writelines(f"{shard} sample {key!r}: {why}\n" for key, why in lost.items())
            file.write("" if first else f"{shard}: no sample can be read\n")
    whole_ones = sum(json.loads(stats.read_text())["successes"] for stats in out.glob("*_stats.json"))
    return whole_ones, len(set((out / LOST).read_text(encoding="utf-8").splitlines()))


def _all_shards(index: Index) -> list[str]:
    return sorted([*index.shards, *index.damage])


def _readable(path: Path, fields: dict[str, str], lost: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The samples of a shard that can be read, with what its Parquet file says of them; `lost` fills with the others."""
    try:
        samples = read_headers(path)
    except Damaged:
        samples = salvage(path)
    seen: Counter[str] = Counter()
    with path.open("rb") as file:
        try:
            records = records_of(path, file.fileno(), samples)
        except Damaged:
            records = [{}] * len(samples)
        for (key, spans), record in zip(samples.items(), records):
            members = {m: os.pread(file.fileno(), size, at) for m, (at, size) in spans.items() if is_known(m)}
            if fault := _fault(members, fields):
                lost[key] = fault
                continue
            if record and ("json" not in members or path.with_suffix(".parquet").is_file()):
                members["json"] = json.dumps(record, default=str).encode()
            name = key.removeprefix("./").replace("..", "_").lstrip("/")
            seen[name] += 1
            yield {"__key__": name if seen[name] == 1 else f"{name}-{seen[name]}", **members}


def _fault(members: dict[str, bytes], fields: dict[str, str]) -> str:
    """Why a sample cannot be read, empty where it can."""
    if lacking := [member for member in fields.values() if member not in members]:
        return f"lacks {', '.join(lacking)}"
    try:
        for member in fields.values():
            decode(member, members[member], View(8, 8))
    except BadSample as error:
        return f"{error.__cause__}".partition(" <_io")[0]
    return ""


def is_known(member: str) -> bool:
    """Whether members of this name are ever read."""
    try:
        return bool(decoder(member))
    except ValueError:
        return False
