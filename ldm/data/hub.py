"""Datasets of the Hugging Face hub, read by its library `datasets`, which is installed apart: pip install datasets.

Map-style they have our order, position and resume, as `data=torch` has. `streaming` reads them as they come, through a shuffle
buffer, and after a resume goes on with other samples; crops, noise and dropout, which follow `position`, go on as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm.data.batch.ahead import ahead
from ldm.data.batch.cut import SIZES, cut, told
from ldm.data.batch.samples import Samples, loading
from ldm.data.dataset import SAMPLE, MapStyle, value_of
from ldm.data.shard.decode import View
from ldm.data.shards import Split
from ldm.data.stream import begin, consumed, go_on, joined
from ldm.errors import NotFound, Refusal, Unreachable
from ldm.types import Batch, mix

MEASURED = 100_000  # samples of a stream that stand for all where something is measured over the training set
FIELDS = {"image": "image", "caption": "text"}


class Hub(MapStyle):
    """A dataset of the hub.

    Args:
        name: ORG/NAME, or one of the library's readers, such as imagefolder.
        config: which of its configurations.
        split, val_split: such as train and test, or slices, train[:90%].
        streaming: reads training samples as they come.
        shuffle: so many samples of a stream wait in a buffer, from which the next one is drawn.
        fields: batch field -> column.
        data_dir: where a reader such as imagefolder reads.
        size, batch, seed, workers, crop, flip, on_mismatch: as in Shards.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        streaming: bool = False,
        fields: Mapping[str, str | None] | None = None,
        data_dir: str | None = None,
        shuffle: int = 1000,
        size: int = 256,
        batch: int = 64,
        seed: int = 0,
        workers: int = 0,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        on_mismatch: Literal["refuse", "restart_epoch"] = "refuse",
    ) -> None:
        workers = min(workers, 1) if streaming else workers  # the library shares streams out by their files
        make = partial(load, name, config, data_dir=data_dir)
        val = None if val_split is None else partial(make, split=val_split)
        fields = FIELDS if fields is None else fields
        super().__init__(partial(make, split=split), val, fields, size, batch, seed, workers, crop, flip, on_mismatch)
        self.name, self.streaming, self.shuffle = name, streaming, shuffle
        self._stream = partial(make, split=split, streaming=True)

    def prepare_data(self) -> None:
        """Fetches what is not here yet, once on each node."""
        _ = self.val_set if self.streaming else (self.train_set, self.val_set)

    def setup(self, stage: str | None = None) -> None:
        """Looks at the first sample of a stream; of a dataset that lies here as data=torch does."""
        if not self.streaming:
            super().setup(stage)
            return
        first = next(iter(self._stream()), None)
        if first is None:
            raise NotFound(f"data.name={self.name}: there are no samples in it.")
        _ = self.val_set
        self.learn(first, "data.name")

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless micro-batches of this device."""
        if not self.streaming:
            return super().train_dataloader()
        rank, world, accumulate = begin(self)
        drawn = Streaming(self, rank, world, accumulate)
        return ahead(DataLoader(drawn, batch_size=None, **loading(self.workers, again=False)), self.trainer)

    @cached_property
    def train_set(self) -> Samples:
        """The training samples; those of a stream have no numbers."""
        return Unnumbered(self) if self.streaming else self._opened("train", self.datasets["train"])

    def ordered(self, split: Split, batch: int, rank: int = 0, world: int = 1) -> DataLoader:
        """As in Shards; of a stream the first MEASURED samples as they come, which stand for all."""
        if not self.streaming or split == "val":
            return super().ordered(split, batch, rank, world)
        return DataLoader(Ordered(self, batch, rank, world), batch_size=None, **loading(self.workers, again=False))

    def state_dict(self) -> dict[str, Any]:
        """Where training stands."""
        return consumed(self) if self.streaming else super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint stopped; a stream with other samples."""
        if self.streaming:
            go_on(self, state_dict)
        else:
            super().load_state_dict(state_dict)


class Unnumbered:
    """What is known of a stream's training samples, which come one after the other: its name, and captions.

    Raises:
        Refusal: where they are counted, or asked for by number.
    """

    def __init__(self, data: Hub) -> None:
        self.data, self.index = data, self

    def fingerprint(self) -> str:
        """-> the stream's name, in place of a hash."""
        return f"{self.data.name}, a stream"

    def captions(self, field: str = "caption") -> list[str]:
        """-> the captions of its first MEASURED samples."""
        data = self.data
        member, place, rows = data.fields[field], data.places[field], islice(data._stream(), MEASURED)
        return [value_of(row[place], member, View(1, 1), mix(data.seed, SAMPLE, i)) for i, row in enumerate(rows)]

    def __len__(self) -> int:
        raise Refusal(
            f"data.name={self.data.name}: training samples are asked for by number, and a stream (data.streaming=true) gives "
            "them as they come. Read them onto this machine, data.streaming=false, all or a part, 'data.split=train[:10000]'; "
            "evaluate can do without: requests=val reference=val, or prompts=FILE reference=FOLDER."
        )


class Streaming(IterableDataset):
    """Micro-batches of a stream for one rank, epoch after epoch, each shuffled otherwise."""

    def __init__(self, data: Hub, rank: int, world: int, accumulate: int) -> None:
        self.make, self.shuffle, self.seed, self.start = data._stream, data.shuffle, data.seed, data.progress.first
        self.fields, self.places, self.pixels = data.fields, data.places, data.size
        self.crop, self.flip, self.batch = data.crop, data.flip, data.batch
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.size = data.batch // (world * accumulate)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert (get_worker_info() is None) or get_worker_info().num_workers == 1
        number, batch = 0, []
        for sample in self._samples():
            step, part = divmod(number, self.accumulate)
            first = (self.start + step) * self.batch + (self.rank * self.accumulate + part) * self.size
            batch.append(self._sample(sample, first + len(batch)))
            if len(batch) == self.size:
                yield joined(batch)
                number, batch = number + 1, []

    def _samples(self) -> Iterator[Mapping[str, Any]]:
        from datasets.distributed import split_dataset_by_node

        stream = self.make().shuffle(seed=mix(self.seed, SAMPLE, self.start) % 2**31, buffer_size=self.shuffle)
        mine, epoch = split_dataset_by_node(stream, rank=self.rank, world_size=self.world), 0
        while True:
            mine.set_epoch(epoch)
            yield from mine
            epoch += 1

    def _sample(self, sample: Mapping[str, Any], position: int) -> dict[str, Any]:
        view = cut(position, self.pixels, self.pixels, self.crop, self.flip, self.seed)
        return made_of(sample, self.fields, self.places, self.seed, position, view)


class Ordered(IterableDataset):
    """A stream's first samples once, in order and square, for one rank; as Once (order.py) shares batches out."""

    def __init__(self, data: Hub, batch: int, rank: int, world: int) -> None:
        self.make, self.fields, self.places, self.pixels, self.seed = data._stream, data.fields, data.places, data.size, data.seed
        self.batch, self.rank, self.world = batch, rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        base, stream = 0, islice(self.make(), MEASURED)
        while some := list(islice(stream, self.batch)):
            mine = range(len(some) * self.rank // self.world, len(some) * (self.rank + 1) // self.world)
            if mine:
                yield joined([self._sample(some[i], base + i) for i in mine])
            base += len(some)

    def _sample(self, sample: Mapping[str, Any], position: int) -> dict[str, Any]:
        view = cut(position, self.pixels, self.pixels, "center", 0.0, self.seed)
        return made_of(sample, self.fields, self.places, self.seed, position, view)


def made_of(
    sample: Mapping[str, Any], fields: Mapping[str, str], places: Mapping[str, int | str], seed: int, position: int, view: View
) -> dict[str, Any]:
    """A sample of a stream as a batch has it.

    Args:
        sample: what the library gives.
        fields: batch field -> kind of member.
        places: batch field -> column.
        seed, position: decide what is chosen at random.
        view: what of its picture is looked at.
    """
    number = mix(seed, SAMPLE, position)
    values = {f: value_of(sample[places[f]], member, view, number) for f, member in fields.items()}
    sizes = dict(zip(SIZES, told(lambda name: np.nan, view, False)))
    return values | {"key": str(position), "position": position, "mirrored": view.flip, **sizes}


def load(name: str, config: str | None, data_dir: str | None, split: str, streaming: bool = False) -> Any:
    """A dataset by the library `datasets`, with pictures decoded when they are asked for.

    Args:
        name: ORG/NAME, or a reader.
        config: which configuration, or None.
        data_dir: where a reader reads, or None.
        split: such as train, or train[:90%].
        streaming: as it comes, or whole on this machine.

    Raises:
        Refusal: the library is not installed, or knows no such dataset or split. Unreachable: the hub is not had.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ModuleNotFoundError as error:
        raise Refusal(f"data=hf reads by the library `datasets`, which is not here: {error}. pip install datasets") from error
    try:
        return load_dataset(name, config, data_dir=data_dir, split=split, streaming=streaming)
    except DatasetNotFoundError as error:
        raise NotFound(f"data.name={name}: {error}") from error
    except ValueError as error:
        raise Refusal(f"data.name={name} data.split={split}: {error}") from error
    except (ConnectionError, OSError) as error:
        raise Unreachable(f"data.name={name} is not had: {' '.join(str(error).split())}") from error
