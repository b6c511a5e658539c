"""The plain WebDataset pipeline, for those who want it: shards drawn again and again, a shuffle buffer, no index.

The fields are those of `data=shards`. Every rank and worker draws with a seed of its own, told explicitly. What it cannot do:
see damage that ends a shard early (the index does), visit each sample once an epoch, filter, or resume exactly; after a resume it
goes on with other draws, while crops, noise and dropout, which follow `position`, go on as they were.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from webdataset import filters, tariterators

from ldm.data.batch.ahead import ahead
from ldm.data.batch.cut import CROP, SIZES, cut, told
from ldm.data.batch.latents import check_provenance
from ldm.data.batch.samples import ATTEMPTS, loading
from ldm.data.order.order import generator
from ldm.data.shard.decode import FORMATS, MAX_BYTES, BadSample, View, decode, is_image
from ldm.data.shard.source import expand
from ldm.data.shard.tar import Damaged
from ldm.data.shards import Shards
from ldm.errors import Refusal
from ldm.files.picture import picture_size
from ldm.types import Batch

DRAWS = 2**32 + 4  # a stream of random numbers
INDEXED = ("filters", "buckets", "weights")


class Streamed(Shards):
    """As Shards, but training reads through WebDataset; `shuffle` samples wait in each worker's buffer.

    Raises:
        Refusal: settings that need an index.
    """

    def __init__(self, train: Any, shuffle: int = 1000, **shards: Any) -> None:
        super().__init__(train, **shards)
        self.shuffle = shuffle
        if self.mixed:
            raise Refusal(
                f"data.fields mixes {', '.join(self.mixed)}: data=stream draws no captions by position; take data=shards."
            )
        for name in INDEXED:
            if shards.get(name):
                raise Refusal(f"data.{name}={shards[name]}: data=stream has no index, which that needs; take data=shards.")

    def prepare_data(self) -> None:
        """Indexes the validation shards."""
        _ = self.val_set

    def setup(self, stage: str | None = None) -> None:
        """Names the training shards."""
        _ = self.val_set, expand(self.train)
        check_provenance(self, None if self.trainer is None else self.trainer.lightning_module)

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless micro-batches of this device."""
        rank, world, accumulate = begin(self)
        drawn = Drawn(self, expand(self.train), rank, self.batch // (world * accumulate), accumulate)
        return ahead(DataLoader(drawn, batch_size=None, **loading(self.workers, again=False)), self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """How many samples training has taken."""
        return consumed(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with other draws."""
        go_on(self, state_dict)


def begin(data: Shards) -> tuple[int, int, int]:
    """Begins a stream, whose samples are not numbered -> rank, number of ranks, micro-batches of a step.

    Raises:
        Refusal: the batch cannot be shared out evenly.
    """
    if data.progress.unsaid(data.trainer):
        data.progress.begin(data.trainer.global_step, data.trainer.global_step)
    data.progress.begun = True
    rank, world, accumulate = data.share()
    if data.batch % (world * accumulate):
        raise Refusal(f"data.batch={data.batch} must be a multiple of {world} devices x {accumulate} micro-batches.")
    return rank, world, accumulate


def consumed(data: Shards) -> dict[str, Any]:
    """How many samples of a stream training has taken, and at which step: what a checkpoint keeps."""
    step = data.trainer.global_step if data.trainer else 0
    return {"consumed": data.progress.at(step), "step": step}


def go_on(data: Shards, state_dict: Mapping[str, Any]) -> None:
    """Takes over what `consumed` gave: the positions go on, the samples are others."""
    data.progress.begin(state_dict["consumed"] // data.batch, state_dict["step"])


class Drawn(IterableDataset):
    """Micro-batches of a stream for one rank.

    Args:
        data: the settings, and where its shards are fetched.
        shards: what is drawn from.
        rank: of this process; each has other draws.
        size: samples of a micro-batch.
        accumulate: micro-batches of a step.
    """

    def __init__(self, data: Streamed, shards: Sequence[str], rank: int, size: int, accumulate: int) -> None:
        self.shards, self.fetch, self.leave_out = shards, data.fetch, data.damaged == "leave_out"
        self.fields, self.pixels, self.crop, self.flip = data.fields, data.size, data.crop, data.flip
        self.shuffle, self.seed, self.start, self.batch = data.shuffle, data.seed, data.progress.first, data.batch
        self.rank, self.size, self.accumulate = rank, size, accumulate
        self.members = (*self.fields.values(), "json")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        random = generator(self.seed, self.start, DRAWS, self.rank * 2**20 + worker)
        bad: list[str] = []
        shards = (self.shards[random.integers(len(self.shards))] for _ in iter(int, 1))
        raw = filters.shuffle(self.shuffle, initial=self.shuffle // 10, seed=int(random.integers(2**31)))
        number, batch = worker, []
        for sample in raw(tariterators.group_by_keys(file for shard in shards for file in self._files(shard, bad))):
            try:
                batch.append(self._decoded(sample, self._first(number) + len(batch)))
            except BadSample as error:
                self._note(str(error), bad)
            if len(batch) == self.size:
                yield joined(batch) | ({"bad": bad.copy()} if bad else {})
                number, batch = number + workers, []
                bad.clear()

    def _files(self, shard: str, bad: list[str]) -> Iterator[dict[str, Any]]:
        """The members of a shard as webdataset has them, read where they are asked for; then a mark of its end."""
        members = tuple(f".{member}" for member in self.members)
        with self.fetch.held(shard) as path:
            file = FileIO(path)
        try:
            with file, tarfile.open(fileobj=file, mode="r:") as tar:
                if tar.next() is None:
                    raise tarfile.ReadError("it holds nothing")
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # forget what was read, or a large shard fills the memory
                    asked = info.name.lower().endswith(members)
                    if asked and (info.islnk() or info.issym() or info.issparse()):
                        raise tarfile.ReadError(f"{info.name} is a link or sparse, which data=shards reads or names")
                    if info.isreg() and info.size <= MAX_BYTES:
                        yield {"fname": info.name, "data": tar.extractfile(info).read() if asked else b"", "__url__": shard}
        except (tarfile.TarError, OSError) as error:
            if not self.leave_out:
                raise Damaged(
                    f"{shard} is damaged or no plain tar: {error}. Mend it with `python -m ldm doctor SHARDS --repair OUT`, "
                    "or go on without what cannot be read: data.damaged=leave_out."
                ) from error
            self._note(f"Shard {shard} is damaged: {error}", bad)
        yield {}

    def _note(self, line: str, bad: list[str]) -> None:
        bad.append(line)
        if len(bad) >= ATTEMPTS + self.size:
            raise Refusal(f"A batch of {self.size} samples cannot be filled, {len(bad)} could not be read; the last: {line}")

    def _decoded(self, sample: Mapping[str, Any], position: int) -> dict[str, Any]:
        where = f"sample {sample['__key__']!r} in {sample['__url__']}"
        if lacking := [member for member in self.fields.values() if member not in sample]:
            raise BadSample(f"Member {lacking[0]!r} of {where} is missing.")
        view = cut(position, self.pixels, self.pixels, self.crop, self.flip, self.seed)
        values = {f: decode(m, sample[m], view, where) for f, m in self.fields.items()}
        return values | {"key": sample["__key__"], "position": position} | self._sizes(sample, view)

    def _sizes(self, sample: Mapping[str, Any], view: View) -> dict[str, Any]:
        """As in Loaded, from the sample's own record and the header of its picture."""
        try:
            record = decode("json", sample.get("json", b"{}"), view)
        except BadSample:
            record = {}
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        pictures = [sample[member] for member in self.fields.values() if is_image(member)]
        if not pictures and CROP[0] not in numbers:
            return {}
        if pictures and not {"width", "height"} <= numbers.keys():
            numbers |= dict(zip(("width", "height"), picture_size(pictures[0], FORMATS)))
        for side in ("width", "height"):
            numbers.setdefault(f"original_{side}", numbers.get(side, math.nan))
        sizes = told(lambda name: numbers.get(name, math.nan), view, CROP[0] in numbers)
        return {"mirrored": view.flip, **dict(zip(SIZES, sizes))}

    def _first(self, number: int) -> int:
        """The position of the first sample of this rank's `number`-th micro-batch since `start`."""
        step, part = divmod(number, self.accumulate)
        return (self.start + step) * self.batch + (self.rank * self.accumulate + part) * self.size


def joined(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples -> a batch: numbers and arrays as tensors, all else as lists."""
    columns = {field: [sample[field] for sample in batch] for field in batch[0]}
    return {field: v if isinstance(v[0], str | dict) else default_collate(v) for field, v in columns.items()}
