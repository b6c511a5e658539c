"""A folder of pictures as it lies: captions beside them, a metadata table, or class sub-folders; read as `ldm pack` reads them.

cat.jpg with cat.txt; metadata.jsonl, .csv, .tsv or .parquet with a column file_name, as in Hugging Face's imagefolder; or a table
itself. The members that `fields` may name are those of packed shards: jpg (the picture, of any kind), txt (the caption), cls (the
number of its class) and json (what else is known of it). Batches, order, filters, buckets and resume are those of `data=shards`.
Every picture is read once to know what is in it, which is kept in the cache.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ldm.data.batch.listed import Listing
from ldm.data.batch.mixed import Member
from ldm.data.batch.samples import Samples
from ldm.data.order.filter import select
from ldm.data.packing.gather import find
from ldm.data.packing.packed import Packed, Row, found
from ldm.data.packing.table import ENDINGS
from ldm.data.shard.decode import FORMATS, MAX_BYTES, BadSample, is_image
from ldm.data.shard.index import Damage
from ldm.data.shard.record import OWN, apart, is_number, number
from ldm.data.shard.selection import Selection
from ldm.data.shard.source import listed
from ldm.data.shards import Shards, Split
from ldm.errors import NotFound, Refusal
from ldm.files.cache import cache_folder
from ldm.files.content import digest_of, file_content
from ldm.files.picture import open_picture, picture_size, to_srgb
from ldm.files.process import say, warn
from ldm.files.whole import whole

THREADS = 16


class Folder(Shards):
    """Pictures of folders or tables of captions.

    Args:
        train, val: a folder, a table (.csv, .tsv, .jsonl, .json, .parquet), or a list of these.
        damaged: "refuse" rows that name no picture, or two, or "leave_out" them, naming each.
        fields, size, batch, seed, workers, crop, flip, filters, buckets, max_bad_fraction, on_mismatch: as in Shards.
    """

    def __init__(
        self,
        train: str | Path | Sequence[str | Path],
        val: str | Path | Sequence[str | Path] | None = None,
        fields: Mapping[str, Member] | None = None,
        size: int = 256,
        batch: int = 64,
        seed: int = 0,
        workers: int = 0,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        buckets: str | Mapping[str, Any] | Sequence[Sequence[int]] | None = None,
        damaged: Damage = "refuse",
        max_bad_fraction: float = 0.01,
        on_mismatch: Literal["refuse", "restart_epoch"] = "refuse",
    ) -> None:
        how = {"crop": crop, "flip": flip, "filters": filters, "buckets": buckets, "damaged": damaged}
        how |= {"max_bad_fraction": max_bad_fraction, "on_mismatch": on_mismatch}
        super().__init__(train, val, fields, size, batch, seed, workers, **how)
        self.classes: dict[str, int] = {}

    def _opened(self, split: Split, source: Any) -> Samples:
        packed = Packed()
        rows = self._gathered(split, source, packed)
        if split == "train":
            self.classes = packed.classes
        elif strange := sorted({row.label for row in rows if row.label is not None} - self.train_set.labels.keys()):
            raise Refusal(f"data.val={source} has classes that data.train has not: {', '.join(strange[:3])}.")
        listing = _listing(source, rows, self.classes)
        pictures = any(is_image(member) for member in self.fields.values())
        least = self.batch if split == "train" and pictures else 1
        selection, self._buckets[split] = select(listing, self.fields, self.filters, self.sizes, least)
        return Files(listing, selection, self.fields, self.size, rows, self.classes)

    def _gathered(self, split: Split, source: Any, packed: Packed) -> list[Row]:
        rows = [row for one in listed(source) for row in read_rows(Path(one), packed, f"data.{split}")]
        return self._whole(rows, split, packed)

    def _whole(self, rows: list[Row], split: str, packed: Packed) -> list[Row]:
        bad = [f"{row.name}: {row.fault}" for row in rows if row.fault]
        if bad and self.damaged == "refuse":
            more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise Refusal(
                f"data.{split}: {len(bad)} of {len(rows)} rows are no pictures: {'; '.join(bad[:5])}{more}. Mend them, or go on "
                "without them: data.damaged=leave_out."
            )
        if bad:
            warn(f"data.{split}: {len(bad)} rows are left out: {'; '.join(bad)}")
        for note in (*packed.notes, *(f"data.{split}: passed over {n:,} {kind}" for kind, n in packed.passed_over.items())):
            say(note)
        return [row for row in rows if not row.fault]


class Files(Samples):
    """Samples whose members are files, and rows of a table.

    Args:
        listing: what is known of the samples.
        selection: which of them count.
        fields: batch field -> member.
        size: pixels.
        rows: the pictures.
        labels: each class' number, by name.
    """

    def __init__(
        self,
        listing: Listing,
        selection: Selection,
        fields: Mapping[str, str],
        size: int,
        rows: Sequence[Row],
        labels: Mapping[str, int],
    ) -> None:
        super().__init__(listing, selection, fields, size)
        self.files, self.labels = rows, dict(labels)

    def _bytes(self, shard: int, row: int, member: str) -> bytes:
        one = self.files[row]
        if is_image(member):
            return self._picture(one)
        words = {"txt": one.caption, "json": json.dumps(one.columns, default=str), "cls": str(self.labels.get(one.label, ""))}
        return words[member].encode()

    def _picture(self, row: Row) -> bytes:
        try:
            if row.file.stat().st_size > MAX_BYTES:
                raise BadSample(f"{row.file} is too large.")
            data = row.file.read_bytes()
        except OSError as error:
            raise BadSample(f"{row.file} cannot be read: {error!r}") from error
        try:
            if open_picture(data).format in (*FORMATS, "MPO"):
                return data
            lossless = io.BytesIO()  # of a kind that shards do not hold
            to_srgb(open_picture(data)).save(lossless, "PNG", compress_level=0)
            return lossless.getvalue()
        except ValueError as error:
            raise BadSample(f"{row.file} is no whole picture: {error}") from error


def read_rows(source: Path, packed: Packed, option: str) -> list[Row]:
    """The pictures of one source.

    Raises:
        NotFound: nothing is there, or no pictures.
        Refusal: a table that cannot be read in one way only, or folders of several splits.
    """
    try:
        rows = find(source, packed)
    except NotFound as error:
        raise NotFound(f"{option}={source}: {error}") from error
    except Refusal as error:
        told = str(error).split(" Pack each by itself")[0]
        if told != str(error):
            raise Refusal(f"{option}: {told} Name one of them: {option}={source}/...") from error
        raise
    if not rows:
        raise NotFound(f"{option}={source}: there are no pictures ({', '.join(ENDINGS)}) in it.{found(packed)}")
    return rows


def _listing(source: Any, rows: Sequence[Row], classes: Mapping[str, int]) -> Listing:
    files = [os.path.abspath(row.file) for row in rows]
    home = os.path.commonpath([os.path.dirname(file) for file in files])
    names = [os.path.relpath(file, home) for file in files]
    once = {file: i for i, file in enumerate(dict.fromkeys(files))}
    seen = _seen(list(once)).take([once[file] for file in files])
    numbers = {name: seen[name].to_numpy() for name in ("width", "height")}
    numbers |= {f"original_{side}": numbers[side] for side in ("width", "height")}
    for column in dict.fromkeys(name for row in rows for name, value in row.columns.items() if is_number(value)):
        named = apart(column, (*OWN, *numbers), {})
        numbers[named] = np.array([number(row.columns.get(column)) for row in rows])
    hashes = seen["sha256"].to_pylist()
    numbers["hash"] = np.array([int(digest[:16], 16) for digest in hashes], dtype=np.uint64)
    numbers["caption_length"] = np.array([len(row.caption) for row in rows])
    there = np.ones(len(rows), dtype=bool)
    members = {"jpg": there, "txt": there, "json": there}
    members |= {"cls": np.array([row.label in classes for row in rows])} if classes else {}
    told = [json.dumps([n, h, row.caption, row.label, row.columns], default=str) for n, h, row in zip(names, hashes, rows)]
    content = digest_of([json.dumps(dict(classes)), *told])
    return Listing(str(source), names, members, numbers, content, cache_folder() / "folders" / digest_of([home])[:16])


def _seen(files: Sequence[str]) -> pa.Table:
    """sha256, width and height of each picture, from the cache where none has changed since."""
    stats = [os.stat(file) for file in files]
    looks = [f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}" for stat in stats]
    state = digest_of([f"{file} {look}" for file, look in zip(files, looks)])
    path = cache_folder() / "folders" / f"{state[:32]}.arrow"
    if not path.is_file():
        with ThreadPoolExecutor(THREADS) as pool:
            show = partial(tqdm, total=len(files), desc="reading pictures", unit="picture", disable=len(files) < 1000)
            rows = list(show(pool.map(_see, files)))
        columns = {"sha256": pa.array([r[0] for r in rows], pa.string())}
        columns |= {side: pa.array([r[i] for r in rows], pa.float64()) for i, side in ((1, "width"), (2, "height"))}
        table = pa.table(columns)
        with whole(path) as part, pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _see(file: str) -> tuple[str, float, float]:
    """-> sha256, width, height; NaN where there is no size."""
    try:
        size = picture_size(Path(file).read_bytes())
    except ValueError:
        size = (np.nan, np.nan)
    return file_content(file), *map(float, size)
