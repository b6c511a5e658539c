"""Finds samples that were several: a key ends at the first dot of a name, so img.0001.jpg and img.0002.jpg are one `img`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from ldm.data.shard.decode import is_image
from ldm.data.shard.index import Index, Table

COUNTER = re.compile(r"[\d_-][\d._-]*")  # what stands between two dots where files are numbered


def folded(index: Index, members: Mapping[str, int], wanted: Collection[str]) -> dict[str, str]:
    """-> shard -> what its samples hold that looks like pictures of other keys.

    A member such as 0001.jpg looks like one where its first part is a number, or where no more than half of the samples have it;
    `left.jpg`, which most have, is a name of its own.

    Args:
        members: how many samples have each member.
        wanted: members that are meant.
    """
    odd_ones = {}
    for s, shard in enumerate(index.shards):
        table = index.table(s)
        odd = [m for m in table.members if m not in wanted and "." in m and is_image(m) and _is_cut(m, members, len(index))]
        if not odd:
            continue
        counts = np.sum([table.has(member) for member in odd], axis=0)
        wrong = (counts > 1) | ((counts == 1) & ~_has_picture(table))
        if wrong.any():
            row = int(wrong.argmax())
            names = [member for member in odd if table.has(member)[row]]
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            odd_ones[shard] = (
                f"{int(wrong.sum()):,} samples hold pictures of longer keys, such as {table.key(row)!r} with "
                f"{', '.join(names[:3])}{more}"
            )
    return odd_ones


def _is_cut(member: str, members: Mapping[str, int], count: int) -> bool:
    first = member.rpartition(".")[0]
    if COUNTER.fullmatch(first) or 2 * members[member] <= count:
        return True
    return count == 1 and any(f"{first}.{other}" in members for other in ("txt", "json", "cls"))


def _has_picture(table: Table) -> np.ndarray:
    """(rows) bool, which samples have a picture under a plain name, such as jpg."""
    plain = [table.has(member) for member in table.members if "." not in member and is_image(member)]
    return np.any(plain, axis=0) if plain else np.zeros(len(table), dtype=bool)
