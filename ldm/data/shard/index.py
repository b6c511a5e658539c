"""Where every member of every sample lies, and what is known about it: one Arrow file for each shard, mapped into memory.

The files lie in `.index` beside the shards, or below the cache folder where that cannot be written to; an index that somebody
else left beside the shards is read. They are made in parallel, once, and again only for shards that changed, or whose Parquet
or statistics file did. A table of all shards (count, digest) is read by every process; a shard's own file only when its samples
are. So memory does not grow with the number of samples.

Columns: `key`; `<member>:offset` and `<member>:size` in bytes (offset -1 where a sample lacks it); `width`, `height`,
`original_width`, `original_height` and every other number of the sample's record (json, and 00000.parquet beside 00000.tar),
NaN where it is not said, `source_key` for a `key` that is a number, and so on; `caption_length` in characters; `hash`, 64 bits
of the record's sha256, sha512 or md5, else 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ldm.data.shard.content import shard_content
from ldm.data.shard.fetch import CACHE, Fetch, is_remote
from ldm.data.shard.recent import Recent
from ldm.data.shard.record import describe
from ldm.data.shard.tar import Damaged
from ldm.errors import NotWritten, Refusal
from ldm.files.content import digest_of
from ldm.files.process import cores
from ldm.files.whole import whole

VERSION = 5  # of the columns and the digest; another one is made anew
OPEN_TABLES = 256
FEW = 16  # shards that are read without more processes

Damage = Literal["refuse", "leave_out"]


class Index:
    """The samples of some shards, by (shard, row).

    Args:
        shards: paths or addresses, as `expand` gives them.
        fetch: brings remote shards here.
        damaged: "refuse" damaged shards, or "leave_out" what they hold, naming each.
        cache: folder for index files that cannot lie beside the shards.

    Raises:
        Refusal: shards are damaged and `damaged` is "refuse"; names each, with its reason.
    """

    def __init__(
        self, shards: Sequence[str], fetch: Fetch | None = None, damaged: Damage = "refuse", cache: str | Path = CACHE
    ) -> None:
        self.fetch = fetch or Fetch(cache)
        folders = _index_folders(shards[0], cache)
        self.folder = _writable(folders)
        stamps = _stamps(shards, self.fetch)
        self.state = digest_of([*map(_absolute, shards), *stamps])  # changes whenever anything that was read does
        name = f"all-{self.state[:16]}.arrow"
        summary = next((folder / name for folder in folders if (folder / name).is_file()), self.folder / name)
        if not summary.is_file():
            _write(_describe_all(shards, stamps, self.fetch, cache), summary)
        table = _read(summary)
        self.damage = {s: why for s, why in zip(shards, table["damage"].to_pylist()) if why}
        if self.damage and damaged == "refuse":
            raise Refusal(_refusal(self.damage, len(shards)))
        whole = np.array([s not in self.damage for s in shards])
        self.shards = [s for s in shards if s not in self.damage]
        self.counts = table["count"].to_numpy()[whole]  # (S) int64, samples of each shard
        self.digests = [d for d, w in zip(table["digest"].to_pylist(), whole) if w]
        self._files = [Path(file) for file, w in zip(table["file"].to_pylist(), whole) if w]
        self._tables: Recent[int, Table] = Recent(OPEN_TABLES, self._open)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def table(self, shard: int) -> Table:
        """The columns of a shard."""
        return self._tables[shard]

    @cached_property
    def members(self) -> list[str]:
        """The members that samples of the first shard have."""
        return self.table(0).members if self.shards else []

    def fingerprint(self) -> str:
        """-> sha256, in hex, over the shards' names and what is in them (content.py): another data set has another."""
        return digest_of(self.digests)

    def _open(self, shard: int) -> Table:
        return Table(_read(self._files[shard]))


class Table:
    """The columns of one shard, mapped into memory.

    spans: member -> offsets and sizes in bytes, (rows) each; offset -1 where a sample lacks it.
    """

    def __init__(self, table: pa.Table) -> None:
        self._keys = table["key"]
        self._columns = {name: table[name].to_numpy() for name in table.column_names if name != "key"}
        self.spans = {m: (self._columns[f"{m}:offset"], self._columns[f"{m}:size"]) for m in self.members}

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def numbers(self) -> list[str]:
        """The columns that say something of the samples themselves."""
        return [name for name in self._columns if ":" not in name and name != "hash"]

    def has(self, member: str) -> np.ndarray:
        """(rows) bool, which samples have a member."""
        offsets = self.column(f"{member}:offset")
        return np.zeros(len(self), dtype=bool) if offsets is None else offsets >= 0

    @property
    def members(self) -> list[str]:
        """What the samples may have."""
        return [name.removesuffix(":size") for name in self._columns if name.endswith(":size")]

    @property
    def keys(self) -> list[str]:
        """The samples' keys."""
        return self._keys.to_pylist()

    def key(self, row: int) -> str:
        """A sample's key."""
        return self._keys[row].as_py()

    def column(self, name: str) -> np.ndarray | None:
        """(rows) a column, None where the shard has none of that name."""
        return self._columns.get(name)

    def span(self, row: int, member: str) -> tuple[int, int]:
        """-> offset and size in bytes; offset -1 where the sample lacks the member."""
        if member not in self.spans:
            return -1, 0
        offsets, sizes = self.spans[member]
        return offsets.item(row), sizes.item(row)

    def number(self, row: int, name: str) -> float:
        """One number of a sample's record, NaN where it is not said."""
        column = self._columns.get(name)
        return float("nan") if column is None else float(column[row])


def _describe_all(shards: Sequence[str], stamps: Sequence[str], fetch: Fetch, cache: str | Path) -> pa.Table:
    """Reads the shards whose index files are missing or old; -> count, digest, damage and index file of each shard."""
    known = [_kept(_index_files(shard, cache), stamp) for shard, stamp in zip(shards, stamps)]
    todo = [(s, stamp, cache, fetch) for s, stamp, entry in zip(shards, stamps, known) if entry is None]
    if len(todo) <= FEW:
        made = [_describe_one(work) for work in todo]
    else:
        with ProcessPoolExecutor(cores(), _processes()) as pool:
            made = list(tqdm(pool.map(_describe_one, todo, chunksize=4), total=len(todo), desc="reading shards", unit="shard"))
    fresh = iter(made)
    rows = [next(fresh) if entry is None else entry for entry in known]
    return pa.Table.from_pylist([{k: row[k] for k in ("count", "digest", "damage", "file")} for row in rows])


def _processes() -> BaseContext:
    """Processes that inherit nothing of this one, and import what they need once, not each for itself."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _describe_one(work: tuple[str, str, str | Path, Fetch]) -> dict:
    shard, stamp, cache, fetch = work
    file = _writable(_index_folders(shard, cache)) / _index_name(shard)
    with fetch.held(shard) as path:
        try:
            table, damage = describe(path), ""
        except Damaged as error:
            table, damage = pa.table({"key": pa.array([], pa.string())}), str(error)
        digest = digest_of([Path(shard).name, shard_content(path, Table(table).keys, Table(table).spans)])
    about = {"stamp": stamp, "count": len(table), "digest": digest, "damage": damage}
    _write(table.replace_schema_metadata({"ldm": json.dumps(about)}), file)
    return about | {"file": os.path.abspath(file)}


def _kept(files: Sequence[Path], stamp: str) -> dict | None:
    """What the first index file of a shard's present state says, None where there is none."""
    for file in files:
        try:
            about = json.loads(_read(file).schema.metadata[b"ldm"])
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
            continue
        if about["stamp"] == stamp:
            return about | {"file": os.path.abspath(file)}
    return None


def _stamps(shards: Sequence[str], fetch: Fetch) -> list[str]:
    """What changes when a shard does, or what lies beside it."""

    def stamp(shard: str) -> str:
        beside = [] if is_remote(shard) else [shard.removesuffix(".tar") + end for end in (".parquet", "_stats.json")]
        return " ".join([str(VERSION), *(f"{Path(p).suffix} {fetch.stamp(p)}" for p in (shard, *filter(os.path.isfile, beside)))])

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(stamp, shards))


def _index_files(shard: str, cache: str | Path) -> list[Path]:
    """Where a shard's index file may lie."""
    return [folder / _index_name(shard) for folder in _index_folders(shard, cache)]


def _index_name(shard: str) -> str:
    return f"{shard.rpartition('/')[2]}.arrow"


def _index_folders(shard: str, cache: str | Path) -> list[Path]:
    """Beside the shard, where it is local, and below the cache."""
    folder = shard.rpartition("/")[0] or "."
    known = folder if is_remote(shard) else str(Path(folder).resolve())
    cached = Path(cache).expanduser() / "index" / digest_of([known])[:16]
    return [cached] if is_remote(shard) else [Path(folder) / ".index", cached]


def _writable(folders: Sequence[Path]) -> Path:
    """The first that can be written to, or made; else the last, which says why it cannot."""
    there = (next(f for f in (folder, *folder.parents) if f.exists()) for folder in folders)
    return next((folder for folder, f in zip(folders, there) if os.access(f, os.W_OK)), folders[-1])


def _absolute(shard: str) -> str:
    return shard if is_remote(shard) else os.path.abspath(shard)


def _write(table: pa.Table, path: Path) -> None:
    """The file appears whole or not at all.

    Raises:
        OSError: it cannot; names the setting to change.
    """
    try:
        with whole(path) as part, pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())
    except OSError as error:
        raise NotWritten(
            f"The index of the shards cannot be written into {path.parent}: {error}. Name a folder that it can be written into: "
            "data.cache=FOLDER, or LDM_CACHE=FOLDER in the environment."
        ) from error


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _refusal(damage: dict[str, str], count: int) -> str:
    named = "; ".join(f"{shard} {why}" for shard, why in list(damage.items())[:5])
    more = f"; and {len(damage) - 5} more" if len(damage) > 5 else ""
    return (
        f"{len(damage)} of {count} shards are damaged: {named}{more}. Make them again, mend them with "
        "`python -m ldm doctor SHARDS --repair OUT`, or go on without them: data.damaged=leave_out."
    )
