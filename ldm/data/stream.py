"""The plain WebDataset pipeline, for those who want it: shards drawn again and again, a shuffle buffer, no index.

The fields are those of `data=shards`. Every rank and worker draws with a seed of its own, told explicitly. What it cannot do:
see damage that ends a shard early (the index does), visit each sample once an epoch, or resume exactly; after a resume it goes
on with other draws, while noise and dropout, which follow `position`, go on as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from webdataset import filters, tariterators

from ldm.data.ahead import ahead
from ldm.data.decode import BadSample, View, decode
from ldm.data.fetch import Fetch
from ldm.data.order import generator
from ldm.data.samples import stay
from ldm.data.shards import Shards
from ldm.data.source import expand
from ldm.types import Batch

DRAWS = 2**32 + 4  # a stream of random numbers


class Streamed(Shards):
    """As Shards, but training reads through WebDataset; `shuffle` samples wait in each worker's buffer."""

    def __init__(self, train: Any, shuffle: int = 1000, **shards: Any) -> None:
        super().__init__(train, **shards)
        self.shuffle = shuffle

    def prepare_data(self) -> None:
        """Indexes the validation shards."""
        _ = self.val_set

    def setup(self, stage: str | None = None) -> None:
        """Names the training shards."""
        _ = self.val_set, expand(self.train)

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless micro-batches of this device."""
        rank, world, accumulate = self._share()
        size = self.batch // (world * accumulate)
        if size * world * accumulate != self.batch:
            raise ValueError(f"data.batch={self.batch} must be a multiple of {world} devices x {accumulate} micro-batches.")
        start = self.consumed // self.batch
        drawn = Drawn(expand(self.train), self.fields, self.size, self.fetch, self.shuffle, self.seed)
        drawn.rank, drawn.size, drawn.batch, drawn.accumulate, drawn.start = rank, size, self.batch, accumulate, start
        workers = {"num_workers": self.workers, "worker_init_fn": stay}
        return ahead(DataLoader(drawn, batch_size=None, pin_memory=torch.cuda.is_available(), **workers), self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """How many samples training has taken."""
        step = self.trainer.global_step if self.trainer else 0
        return {"consumed": step * self.batch + self._ahead, "step": step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with other draws."""
        self.consumed = state_dict["consumed"]
        self._ahead, self._resumed = self.consumed - state_dict["step"] * self.batch, True


class Drawn(IterableDataset):
    """Batches of one rank; `rank`, `size` of a micro-batch, global `batch`, `accumulate`, `start` step are set from outside."""

    rank, size, batch, accumulate, start = 0, 1, 1, 1, 0

    def __init__(
        self, shards: Sequence[str], fields: Mapping[str, str], pixels: int, fetch: Fetch, shuffle: int, seed: int
    ) -> None:
        self.shards, self.fields, self.fetch, self.shuffle, self.seed = shards, fields, fetch, shuffle, seed
        self.view = View(pixels, pixels)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        random = generator(self.seed, self.start, DRAWS, self.rank * 2**20 + worker)
        urls = ({"url": self.fetch(self.shards[random.integers(len(self.shards))])} for _ in iter(int, 1))
        raw = filters.shuffle(self.shuffle, initial=self.shuffle // 10, seed=int(random.integers(2**31)))
        samples = raw(tariterators.group_by_keys(tariterators.tar_file_expander(tariterators.url_opener(urls))))
        number, bad, batch = worker, [], []
        for sample in samples:
            try:
                batch.append(self._decoded(sample))
            except BadSample as error:
                bad.append(str(error))
            if len(batch) == self.size:
                yield self._joined(batch, number) | ({"bad": bad} if bad else {})
                number, bad, batch = number + workers, [], []

    def _decoded(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        where = f"sample {sample['__key__']!r} in {sample['__url__']}"
        if lacking := [member for member in self.fields.values() if member not in sample]:
            raise BadSample(f"Member {lacking[0]!r} of {where} is missing.")
        return {f: decode(m, sample[m], self.view, where) for f, m in self.fields.items()} | {"key": sample["__key__"]}

    def _joined(self, batch: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
        """`number` counts this rank's micro-batches from `start` on."""
        step, part = divmod(number, self.accumulate)
        first = (self.start + step) * self.batch + (self.rank * self.accumulate + part) * self.size
        joined = {field: [sample[field] for sample in batch] for field in batch[0]}
        joined["position"] = list(range(first, first + self.size))
        return {field: v if isinstance(v[0], str | dict) else default_collate(v) for field, v in joined.items()}
