"""Names the shards behind a folder, a tar, a glob, a brace pattern, an address, or a list of these."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.data.shard.fetch import SCHEMES, check_remote, is_remote, list_remote
from ldm.errors import NotFound, Refusal

Sources = str | Path | Sequence[str | Path]
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def expand(source: Sources, option: str = "data.train") -> list[str]:
    """Names the shards behind a folder, a tar, a glob, a brace pattern (`{00000..00012}.tar`), or a list of these.

    Args:
        option: the config line to name in errors.
    Returns:
        paths and addresses, sorted, each once.

    Raises:
        Refusal: see `check_sources`.
        FileNotFoundError: there are no shards.
    """
    check_sources(source, option)
    shards = sorted({path for one in listed(source) for path in _expand_one(one, option)})
    if not shards:
        raise NotFound(_nothing("[]", option))
    return shards


def passed_over(source: Sources) -> list[str]:
    """What lies in a source's folders and looks like shards, but is not read, a line for each folder."""
    lines = []
    for folder in (Path(one) for one in listed(source) if not is_remote(one) and Path(one).is_dir()):
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        packed = [n for n in names if n.lower().endswith((".tar.gz", ".tgz", ".zip", ".tar")) and not n.endswith(".tar")]
        packed += [f"{n}/" for n in names if (folder / n).is_dir() and any((folder / n).glob("*.tar"))]
        if packed:
            few = ", ".join(packed[:3]) + (", ..." if len(packed) > 3 else "")
            lines.append(f"{folder}: not read, as it is no *.tar in this folder: {few} ({len(packed):,} in all)")
    return lines


def owners(sources: Sequence[str | Path], shards: Sequence[str]) -> np.ndarray:
    """(S) int64, which of some sources each shard is of.

    Raises:
        Refusal: it is of two.
    """
    owner: dict[str, int] = {}
    for i, one in enumerate(sources):
        for shard in expand(one):
            if owner.setdefault(shard, i) != i:
                raise Refusal(f"data.weights: {shard} belongs to {sources[owner[shard]]} and {one}; a shard has one weight.")
    return np.array([owner[shard] for shard in shards])


def listed(source: Sources) -> list[str]:
    """The entries of a source, each as text."""
    return [str(one) for one in ([source] if isinstance(source, str | Path) else source)]


def check_sources(source: Sources, option: str = "data.train") -> None:
    """Makes sure that shards can be read from such places, without a look at them.

    Raises:
        Refusal: an address that shards are not read from (`pipe:`), or whose reader is not installed.
    """
    for one in listed(source):
        if is_remote(one):
            check_remote(one, option)
        elif _SCHEME.match(one):
            raise Refusal(
                f"{option}={one!r}: shards are read from local paths (a folder, *.tar, a list) and from "
                f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}; nothing else, and never from a command."
            )


def _expand_one(source: str, option: str) -> list[str]:
    if is_remote(source):
        return [shard for pattern in _braces(source) for shard in _expand_remote(pattern, option)]
    if Path(source).is_dir():
        shards = [str(path) for path in Path(source).glob("*.tar") if not path.name.startswith(".")]
        if not shards:
            raise NotFound(" ".join([_nothing(f"{source}/*.tar", option), *passed_over(source)]))
        return shards
    if Path(source).is_file():
        return [source]
    folder, slash, name = source.rpartition("/")  # of a folder that is there the signs are no pattern
    there = bool(slash) and Path(folder or "/").is_dir()
    patterns = [glob.escape(folder) + slash + part for part in _braces(name)] if there else _braces(source)
    paths = []
    for pattern in patterns:
        shards = [pattern] if Path(pattern).is_file() else [path for path in glob.glob(pattern) if Path(path).is_file()]
        if not shards:
            raise NotFound(_nothing(pattern, option))
        paths += shards
    return paths


def _expand_remote(address: str, option: str) -> list[str]:
    if address.endswith(".tar") and "*" not in address:
        return [address]
    pattern = address if address.endswith(".tar") else f"{address.rstrip('/')}/*.tar"
    shards = [shard for shard in list_remote(pattern) if not shard.rpartition("/")[2].startswith(".")]
    if not shards:
        raise NotFound(_nothing(pattern, option))
    return shards


def _nothing(looked_for: str, option: str) -> str:
    return (
        f"No shards: looked for {looked_for} ({option}). `data=emoji` makes its own shards; for other pictures, img2dataset or "
        f"`python -m ldm pack` makes them. Then set {option} to their folder; data=folder reads pictures as they lie."
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
