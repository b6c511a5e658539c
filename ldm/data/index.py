"""What lies where in a list of tar shards, so that any sample is one read away and no damage goes unseen.

A sample is the members of one shard that share a key: the path up to the first dot of its last part. What follows that dot
names the member (`jpg`, `txt`, `map.png`). Python's tarfile, and with it WebDataset, takes a bad header for the end of the
archive; here such a shard is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")

Spans = dict[str, dict[str, tuple[int, int]]]  # key -> member -> (offset, size)


@dataclass(frozen=True)
class Index:
    """Where every member of every sample lies.

    shards: paths;  keys: one a sample;  shard: (N) int32, the sample's place in `shards`
    spans:  member -> (N, 2) int64, offset and size in bytes; offset -1 where the sample lacks the member
    """

    shards: list[str]
    sizes: list[int]
    keys: list[str]
    shard: np.ndarray
    spans: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """-> sha256, in hex, over the shards' names and sizes and the samples' keys: another data set has another."""
        words = [f"{Path(path).name} {size}" for path, size in zip(self.shards, self.sizes, strict=True)] + self.keys
        return hashlib.sha256("\n".join(words).encode()).hexdigest()


def build(shards: Sequence[str]) -> Index:
    """Reads the headers of every shard.

    Raises:
        ValueError: a shard is damaged, not a tar, or holds another number of samples than its `_stats.json` says.
    """
    read = [_read_shard(path) for path in shards]
    keys = [key for samples in read for key in samples]
    members = [found for samples in read for found in samples.values()]
    spans = {name: np.full((len(keys), 2), -1, dtype=np.int64) for name in sorted({m for found in members for m in found})}
    for i, found in enumerate(members):
        for name, span in found.items():
            spans[name][i] = span
    shard = np.repeat(np.arange(len(read), dtype=np.int32), [len(samples) for samples in read])
    return Index(list(shards), [Path(path).stat().st_size for path in shards], keys, shard, spans)


def expand(source: str | Path | Sequence[str | Path], option: str = "data.train") -> list[str]:
    """Names the shards behind a folder, a tar, a glob, a brace pattern (`{00000..00012}.tar`), or a list of these.

    Args:
        option: the config line to name in errors.
    Returns:
        paths, sorted, each once.

    Raises:
        ValueError: an address that is not a local path (`pipe:`, `s3:`).
        FileNotFoundError: there are no shards.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    shards = sorted({path for one in sources for path in _expand_one(str(one), option)})
    if not shards:
        raise FileNotFoundError(_nothing("[]", option))
    return shards


def _expand_one(source: str, option: str) -> list[str]:
    if _SCHEME.match(source):
        raise ValueError(f"{option}={source!r} is an address; shards are read from local paths only (a folder, *.tar, a list).")
    if Path(source).is_dir():
        found = [str(path) for path in Path(source).glob("*.tar")]
        if not found:
            raise FileNotFoundError(_nothing(f"{source}/*.tar", option))
        return found
    paths = []
    for pattern in _braces(source):
        found = [pattern] if Path(pattern).is_file() else [path for path in glob(pattern) if Path(path).is_file()]
        if not found:
            raise FileNotFoundError(_nothing(pattern, option))
        paths += found
    return paths


def _nothing(looked_for: str, option: str) -> str:
    return (
        f"No shards: looked for {looked_for} ({option}). `data=emoji` makes its own shards; for other pictures, img2dataset or "
        f"`python -m ldm.data.pack` makes them. Then set {option} to their folder."
    )


def _braces(pattern: str) -> list[str]:
    """`a{00..02}` -> a00, a01, a02; `a{b,c}` -> ab, ac."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        width = len(numbers[1])
        choices = [f"{i:0{width}d}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = match[1].split(",")
    return [path for choice in choices for path in _braces(pattern[: match.start()] + choice + pattern[match.end() :])]


def _read_shard(path: str) -> Spans:
    """-> key -> member -> (offset, size), in the shard's order."""
    try:
        with tarfile.open(path, "r:") as tar:
            samples = _read_members(tar)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"Shard {path} is damaged or no plain tar: {error}. Make it again or leave it out.") from error
    _check_count(path, len(samples))
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


def _check_end(path: str, offset: int) -> None:
    """A whole tar ends in two blocks of zeros, and nothing but zeros follows."""
    with open(path, "rb") as file:
        file.seek(offset)
        length = 0
        while chunk := file.read(2**20):
            if chunk.count(0) != len(chunk):
                raise ValueError(f"bad header at byte {offset}, with more data behind it")
            length += len(chunk)
    if length < 1024:
        raise ValueError(f"cut off at byte {offset + length}, without the end mark")


def _check_count(path: str, count: int) -> None:
    """img2dataset says in 00000_stats.json how many samples 00000.tar holds."""
    stats = Path(path).with_name(f"{Path(path).stem}_stats.json")
    if not stats.is_file():
        if count == 0:
            raise ValueError(f"Shard {path} holds no samples. Make it again or leave it out.")
        return
    try:
        wanted = json.loads(stats.read_text(encoding="utf-8"))["successes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{stats} is no img2dataset statistics file with `successes`: {error!r}. Remove it.") from error
    if wanted != count:
        raise ValueError(f"Shard {path} holds {count} samples, but {stats.name} counted {wanted}: it is cut, or another file.")
