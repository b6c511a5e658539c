"""In which order samples are trained on: a function of (seed, position), and of nothing else.

Position p is the p-th sample that training takes, over all ranks and epochs. So a run that stops and goes on, on any number of
ranks or workers, sees the very same sequence. An epoch permutes the shards, then the samples inside windows of shards, each
with a key of its own: a place in an epoch of 400 million samples is found without laying out the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ldm.data.shard.recent import Recent
from ldm.data.shard.selection import Selection
from ldm.errors import Refusal

KEPT = 8  # epochs and windows that are remembered
BUCKETS, MIXTURE = 2**32, 2**32 + 1  # streams of random numbers beside those of the data sets


class Place(NamedTuple):
    """A sample to read, and where it stands in training."""

    position: int
    shard: int
    row: int
    height: int
    width: int


def generator(seed: int, epoch: int, stream: int = 0, part: int = 0) -> np.random.Generator:
    """Random numbers by key: Philox4x64 (Salmon et al. 2011), the same on every platform."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch], counter=[0, 0, stream, part]))


class Stream:
    """An endless sequence of a selection's samples; each epoch of it holds each of them once.

    Args:
        selection: what to read.
        seed: of the order.
        window: shards whose samples are mixed.
        lanes: parts of an epoch that are read side by side, n in lane n % lanes; each has windows of its own.
        number: tells data sets with the same seed apart.
    """

    def __init__(self, selection: Selection, seed: int, window: int, lanes: int = 1, number: int = 0) -> None:
        self.selection, self.seed, self.window, self.lanes, self.number = selection, seed, window, lanes, number
        self.shards = selection.counts.nonzero()[0]
        self._epochs: Recent[int, tuple[np.ndarray, np.ndarray]] = Recent(KEPT, self._epoch)
        self._windows: Recent[tuple[int, int], tuple[np.ndarray, np.ndarray]] = Recent(KEPT + 2 * lanes, self._window)

    def __call__(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """n: (B) int64, places in the sequence -> shard: (B), row: (B)."""
        shard, row = np.empty_like(n), np.empty_like(n)
        epoch, place = np.divmod(n, len(self.selection))
        place = self._riffle(place)
        for e in np.unique(epoch):
            bounds = self._epochs[int(e)][1]
            window = np.searchsorted(bounds, place, side="right") - 1
            for w in np.unique(window[epoch == e]):
                here = (epoch == e) & (window == w)
                shards, rows = self._windows[int(e), int(w)]
                inner = place[here] - bounds[w]
                shard[here], row[here] = shards[inner], rows[inner]
        return shard, row

    def _riffle(self, place: np.ndarray) -> np.ndarray:
        """Lays the lanes, contiguous parts of the epoch, side by side."""
        each, rest = divmod(len(self.selection), self.lanes)
        lane = place % self.lanes
        return lane * each + np.minimum(lane, rest) + place // self.lanes

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """-> the shards in their order, and the places where their windows begin."""
        shards = generator(self.seed, epoch, self.number).permutation(self.shards)
        ends = self.selection.counts[shards].cumsum()
        last = np.arange(self.window, len(shards) + self.window, self.window).clip(max=len(shards)) - 1
        return shards, np.concatenate(([0], ends[last]))

    def _window(self, at: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """-> shard and row of each sample of a window, in their order."""
        epoch, w = at
        shards = self._epochs[epoch][0][w * self.window : (w + 1) * self.window]
        shard = np.repeat(shards.astype(np.int32), self.selection.counts[shards])
        rows = np.concatenate([self.selection.rows_of(s) for s in shards]).astype(np.int32)
        order = generator(self.seed, epoch, self.number, w + 1).permutation(len(shard))
        return shard[order], rows[order]


class Mixture:
    """Several sequences in fixed shares of every batch, each with epochs of its own.

    Raises:
        Refusal: a share is less than one sample a batch.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], batch: int, seed: int) -> None:
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        if len(streams) != len(weights) or min(shares) * batch < 1:
            raise Refusal(
                f"data.weights={list(weights)} must name one weight for each of the {len(streams)} data sets in data.train, and "
                f"give each at least one sample of a batch of {batch} (data.batch)."
            )
        self.streams, self.batch, self.seed, self.lanes = streams, batch, seed, 1
        self.bounds = np.concatenate(([0.0], shares.cumsum()[:-1], [1.0]))

    def __call__(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """n: (batch) int64, one whole batch of the sequence -> shard: (batch), row: (batch)."""
        step = int(n[0]) // self.batch
        before, after = (np.floor(k * self.batch * self.bounds + 0.5).astype(np.int64) for k in (step, step + 1))
        first, last = np.diff(before), np.diff(after)
        parts = [stream(np.arange(a, b)) for stream, a, b in zip(self.streams, first, last)]
        order = generator(self.seed, step, MIXTURE).permutation(self.batch)
        shard, row = (np.concatenate(columns)[order] for columns in zip(*parts))
        return shard, row


class Steps:
    """Optimizer step -> the samples of its global batch, all out of one bucket.

    In epoch e a bucket of N samples has floor((e + 1) N / B) - floor(e N / B) batches of B, in an order of the epoch's own: no
    sample is dropped, and none comes twice before all others of its bucket came once.

    Args:
        streams: one for each bucket.
        sizes: their height and width in pixels.
        counts: their samples.
        batch: samples of a step, over all ranks.
        seed: of the order of buckets.

    Raises:
        Refusal: there are no samples.
    """

    def __init__(
        self, streams: Sequence[Stream | Mixture], sizes: Sequence[tuple[int, int]], counts: Sequence[int], batch: int, seed: int
    ) -> None:
        if not sum(counts):
            raise Refusal("There are no samples to train on; look at data.train and data.filters.")
        self.streams, self.sizes, self.counts, self.batch, self.seed = streams, sizes, list(map(int, counts)), batch, seed
        self._epochs: Recent[int, tuple[np.ndarray, np.ndarray]] = Recent(KEPT, self._epoch)

    def __call__(self, step: int) -> list[Place]:
        """-> its `batch` samples, those that one lane reads side by side."""
        epoch = self.epoch_of(step)
        buckets, numbers = self._epochs[epoch]
        at = step - self.first_step(epoch)
        bucket, number = int(buckets[at]), int(numbers[at])
        stream, (height, width) = self.streams[bucket], self.sizes[bucket]
        n = np.arange(number * self.batch, (number + 1) * self.batch)
        shard, row = stream(n)
        slots = np.argsort(n % stream.lanes, kind="stable").tolist()
        shards, rows = shard.tolist(), row.tolist()
        return [Place(step * self.batch + i, shards[i], rows[i], height, width) for i in slots]

    def first_step(self, epoch: int) -> int:
        """The step at which an epoch begins."""
        return sum(epoch * n // self.batch for n in self.counts)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to."""
        epoch = step * self.batch // sum(self.counts)
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def use(self, epoch: int) -> list[int]:
        """Batches of each bucket in an epoch."""
        return [(epoch + 1) * n // self.batch - epoch * n // self.batch for n in self.counts]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """-> the bucket of each step of an epoch, and which of the bucket's batches it is."""
        use = self.use(epoch)
        buckets = generator(self.seed, epoch, BUCKETS).permutation(np.repeat(np.arange(len(use)), use))
        numbers = np.empty_like(buckets)
        for b, n in enumerate(self.counts):
            numbers[buckets == b] = epoch * n // self.batch + np.arange(use[b])
        return buckets, numbers


class Batches(Sampler[list[Place]]):
    """Endless micro-batches for one rank: its part of each global batch, in `accumulate` pieces.

    Args:
        steps: the order.
        rank, world: this process, and how many there are.
        accumulate: micro-batches of a step.
        start: the first optimizer step; where an earlier run stopped.

    Raises:
        Refusal: the batch cannot be divided evenly.
    """

    def __init__(self, steps: Steps, rank: int = 0, world: int = 1, accumulate: int = 1, start: int = 0) -> None:
        if steps.batch < 1 or steps.batch % (world * accumulate):
            raise Refusal(
                f"data.batch={steps.batch} samples cannot be divided evenly over {world} devices (trainer.devices, "
                f"trainer.num_nodes) x {accumulate} micro-batches (trainer.accumulate_grad_batches); make it a multiple of "
                f"{world * accumulate}."
            )
        self.steps, self.rank, self.world, self.accumulate, self.start = steps, rank, world, accumulate, start

    def __iter__(self) -> Iterator[list[Place]]:
        share = self.steps.batch // self.world
        size = share // self.accumulate
        for step in count(self.start):
            mine = self.steps(step)[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, size):
                yield mine[first : first + size]


class Once(Sampler[list[Place]]):
    """Every sample of some selections once, in order, for one rank; `position` counts up over them.

    Args:
        selections: one for each bucket.
        sizes: their height and width in pixels.
        batch: samples at a time, over all ranks, among which they are shared out; the last ones are as well, so that none is
            there twice.
        rank, world: this process, and how many there are.
    """

    def __init__(
        self, selections: Sequence[Selection], sizes: Sequence[tuple[int, int]], batch: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch < world:
            raise Refusal(f"A batch of {batch} samples cannot be shared by {world} devices; make data.batch at least {world}.")
        self.selections, self.sizes, self.batch, self.rank, self.world = selections, sizes, batch, rank, world

    def __iter__(self) -> Iterator[list[Place]]:
        base = 0
        for selection, (height, width) in zip(self.selections, self.sizes):
            for mine in self._shares(len(selection)):
                places = selection.locate_all(np.arange(mine.start, mine.stop))
                yield [Place(base + i, *at, height, width) for i, at in zip(mine, places)]
            base += len(selection)

    def __len__(self) -> int:
        return sum(1 for selection in self.selections for _ in self._shares(len(selection)))

    def _shares(self, total: int) -> Iterator[range]:
        for first in range(0, total, self.batch):
            size = min(self.batch, total - first)
            mine = range(first + size * self.rank // self.world, first + size * (self.rank + 1) // self.world)
            if mine:
                yield mine
