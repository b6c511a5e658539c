"""Samples that lie in no shards: a listing takes the index's place, and its one part that of a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ldm.data.shard.index import Table
from ldm.data.shard.record import SIZES


class Listing:
    """What Index is of shards, of N samples in one part.

    Args:
        name: of the part, for errors.
        keys: of the samples.
        members: member -> (N) bool, which samples have it.
        numbers: what is known of the samples, (N) each, NaN where it is not; `caption_length` and `hash` as in index.py.
        content: sha256 over all that the samples hold.
        folder: where the choice that filters make is kept.
    """

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        members: Mapping[str, np.ndarray],
        numbers: Mapping[str, np.ndarray],
        content: str,
        folder: Path,
    ) -> None:
        self.shards, self.counts, self.damage = [name], np.array([len(keys)], dtype=np.int64), dict[str, str]()
        self.state, self.folder, self._content = content, folder, content
        unknown = {size: np.full(len(keys), np.nan) for size in SIZES}
        usual = {"caption_length": np.full(len(keys), -1), "hash": np.zeros(len(keys), np.uint64)}
        columns: dict[str, Any] = {"key": pa.array(list(keys), pa.string())}
        for member, has in members.items():
            columns |= {f"{member}:offset": pa.array(np.where(has, 0, -1)), f"{member}:size": pa.array(np.zeros(len(keys), int))}
        self._table = Table(pa.table(columns | {n: pa.array(values) for n, values in {**unknown, **usual, **numbers}.items()}))

    def __len__(self) -> int:
        return int(self.counts[0])

    @property
    def members(self) -> list[str]:
        """What the samples may have."""
        return self._table.members

    def table(self, shard: int) -> Table:
        """The columns of the one part."""
        return self._table

    def fingerprint(self) -> str:
        """-> sha256, in hex, over what the samples hold: another data set has another."""
        return self._content
