"""What lies in one tar shard, strictly read, so that any sample is one read away and no damage goes unseen.

A sample is the members of one shard that share a key: the path up to the first dot of its last part. What follows that dot
names the member (`jpg`, `txt`, `map.png`). Python's tarfile, and with it WebDataset, takes a bad header for the end of the
archive; here such a shard is damaged, and the reason is said.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
BLOCK = 512

Spans = dict[str, dict[str, tuple[int, int]]]  # key -> member -> (offset, size)


class Damaged(ValueError):
    """A shard is not a whole tar, or not the one that its statistics speak of."""


def read_headers(path: str | Path) -> Spans:
    """-> key -> member -> (offset, size) in bytes, in the shard's order.

    Raises:
        Damaged: a bad header, no end mark, data behind it, a member twice, another count than in `_stats.json`, no samples.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            samples = _read_members(tar)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise Damaged(f"is damaged or no plain tar: {error}") from error
    _check_count(Path(path), len(samples))
    return samples


def salvage(path: str | Path) -> Spans:
    """What can still be read of a damaged shard: every member that has a good header and all its bytes, wherever it lies."""
    samples: Spans = {}
    for name, offset, size in _good_headers(Path(path)):
        match = _MEMBER.fullmatch(name)
        if match:
            samples.setdefault(match[1], {}).setdefault(match[2].lower(), (offset, size))
    return samples


def _read_members(tar: tarfile.TarFile) -> Spans:
    samples: Spans = {}
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # forget what was read, or a large shard fills the memory
        match = _MEMBER.fullmatch(info.name)
        if not match or not info.isreg() or info.issparse():
            continue
        key, member = match[1], match[2].lower()
        found = samples.setdefault(key, {})
        if member in found:
            raise ValueError(f"member {info.name} is there twice")
        found[member] = (info.offset_data, info.size)
    return samples


def _check_end(path: str | Path, offset: int) -> None:
    """A whole tar ends in two blocks of zeros, and nothing but zeros follows."""
    with open(path, "rb") as file:
        file.seek(offset)
        length = 0
        while chunk := file.read(2**20):
            if chunk.count(0) != len(chunk):
                raise ValueError(f"bad header at byte {offset}, with more data behind it")
            length += len(chunk)
    if length < 2 * BLOCK:
        raise ValueError(f"cut off at byte {offset + length}, without the end mark")


def _check_count(path: Path, count: int) -> None:
    """img2dataset says in 00000_stats.json how many samples 00000.tar holds."""
    stats = path.with_name(f"{path.stem}_stats.json")
    if not stats.is_file():
        if count == 0:
            raise Damaged("holds no samples")
        return
    try:
        wanted = json.loads(stats.read_text(encoding="utf-8"))["successes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"has a {stats.name} that is no img2dataset statistics file with `successes`: {error!r}") from error
    if wanted != count:
        raise Damaged(f"holds {count} samples, but {stats.name} counted {wanted}: it is cut, or another file")


def _good_headers(path: Path) -> Iterator[tuple[str, int, int]]:
    """-> name, offset and size of each plain member, looking on block by block behind what cannot be read."""
    length, at, long_name = path.stat().st_size, 0, False
    with path.open("rb") as file:
        while at + BLOCK <= length:
            file.seek(at)
            try:
                info = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                at += BLOCK
                continue
            end = at + BLOCK + info.size
            if info.isreg() and not long_name and end <= length:
                yield info.name, at + BLOCK, info.size
            long_name = info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
            at += BLOCK + -(-info.size // BLOCK) * BLOCK if end <= length else BLOCK
