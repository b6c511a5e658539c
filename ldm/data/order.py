"""In which order samples are trained on: a function of (seed, position), and of nothing else.

Position p is the p-th sample that training takes, over all ranks and epochs. So a run that stops and goes on, on any number of
ranks or workers, sees the very same sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


def sample_at(position: int, count: int, seed: int) -> int:
    """The index, below `count`, of the sample at a position; each epoch of `count` positions is a permutation of its own."""
    epoch, place = divmod(position, count)
    return int(_permutation(count, seed, epoch)[place])


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch])).permutation(count)


class Batches(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of (position, index) for one rank.

    Optimizer step k takes the `batch` positions from start + k * batch on, in `accumulate` micro-batches one after the other;
    the ranks lie side by side within each micro-batch.

    Args:
        count: samples in the data set.
        batch: samples of an optimizer step, over all ranks and micro-batches.
        start: position of the first sample; where an earlier run stopped.

    Raises:
        ValueError: `batch` cannot be divided evenly, or there are no samples.
    """

    def __init__(
        self, count: int, batch: int, rank: int = 0, world: int = 1, accumulate: int = 1, seed: int = 0, start: int = 0
    ) -> None:
        if count < 1:
            raise ValueError("There are no samples to train on; look at data.train.")
        if batch < 1 or batch % (world * accumulate):
            raise ValueError(
                f"data.batch={batch} samples cannot be divided evenly over {world} devices (trainer.devices, trainer.num_nodes) "
                f"x {accumulate} micro-batches (trainer.accumulate_grad_batches); make it a multiple of {world * accumulate}."
            )
        self.count, self.batch, self.seed, self.start = count, batch, seed, start
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch // (self.world * self.accumulate)
        first = self.start + self.rank * size
        while True:
            yield [(p, sample_at(p, self.count, self.seed)) for p in range(first, first + size)]
            first += self.world * size


class Once(Sampler[list[tuple[int, int]]]):
    """Every sample once, in order, as batches of (position, index) for one rank; position = index.

    `batch` samples at a time are shared out among the ranks. The last ones are as well, so that no sample is there twice.
    """

    def __init__(self, count: int, batch: int, rank: int = 0, world: int = 1) -> None:
        if batch < world:
            raise ValueError(f"A batch of {batch} samples cannot be shared by {world} devices; make data.batch at least {world}.")
        self.count, self.batch, self.rank, self.world = count, batch, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, self.count, self.batch):
            size = min(self.batch, self.count - first)
            mine = range(first + size * self.rank // self.world, first + size * (self.rank + 1) // self.world)
            if mine:
                yield [(i, i) for i in mine]

    def __len__(self) -> int:
        rest = self.count % self.batch
        last = rest * (self.rank + 1) // self.world > rest * self.rank // self.world
        return self.count // self.batch + int(last)
