"""Which samples of an index are read: all, or some rows of each shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class Selection:
    """Some samples of an index, numbered shard by shard.

    counts: (S) int64, how many of each shard;  rows: (N) int32, which, one shard after the other, None for all of them
    """

    def __init__(self, counts: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.counts, self.rows = counts, rows
        self.starts = np.concatenate(([0], counts.cumsum()))

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> Selection:
        """Of the rows of each shard."""
        counts = np.array([len(r) for r in rows], dtype=np.int64)
        return cls(counts, np.concatenate(rows).astype(np.int32) if len(rows) else np.empty(0, np.int32))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows_of(self, shard: int) -> np.ndarray:
        """(counts[shard]) int64, the rows of one shard, in order."""
        if self.rows is None:
            return np.arange(self.counts[shard])
        return self.rows[self.starts[shard] : self.starts[shard + 1]].astype(np.int64)

    def content(self) -> str:
        """-> sha256, in hex, over which samples these are."""
        digest = hashlib.sha256(np.asarray(self.counts, dtype=np.int64))
        digest.update(b"all" if self.rows is None else np.ascontiguousarray(self.rows))
        return digest.hexdigest()

    def locate(self, i: int) -> tuple[int, int]:
        """The i-th sample -> its shard and row."""
        [(shard, row)] = self.locate_all(np.array([i]))
        return shard, row

    def locate_all(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """(N) numbers of samples -> shard and row of each."""
        shard = np.searchsorted(self.starts, numbers, side="right") - 1
        row = numbers - self.starts[shard] if self.rows is None else self.rows[numbers]
        return list(zip(shard.tolist(), row.tolist()))

    def within(self, chosen: np.ndarray) -> Selection:
        """Of these samples those whose shard is chosen, (S) bool."""
        rows = None if self.rows is None else self.rows[np.repeat(chosen, self.counts)]
        return Selection(np.where(chosen, self.counts, 0), rows)
