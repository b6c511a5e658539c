"""Samples by number, and batches of them: members are read at their offsets and laid straight into the batch."""

from __future__ import annotations

import atexit
import io
import math
import os
import signal
from collections.abc import Mapping, Sequence
from functools import cache, partial
from io import FileIO
from mmap import ACCESS_READ, mmap
from multiprocessing import active_children
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm.data.batch.cut import CROP, SIZES, cut, told
from ldm.data.batch.mixed import Mixed, draw
from ldm.data.order.order import Place, generator
from ldm.data.shard.decode import MAX_BYTES, BadSample, View, decode, is_array, is_image
from ldm.data.shard.index import Index
from ldm.data.shard.recent import Recent
from ldm.data.shard.selection import Selection
from ldm.errors import Refusal
from ldm.files.picture import from_bytes

OPEN_FILES = 128  # shards a process holds open
ATTEMPTS = 100  # substitutes that are tried for one bad sample
REPLACE = 2**32 + 3  # a stream of random numbers


class Where(NamedTuple):
    """Names a sample, for errors."""

    index: Index
    shard: int
    row: int

    def __str__(self) -> str:
        return f"sample {self.index.table(self.shard).key(self.row)!r} in {self.index.shards[self.shard]}"


class Samples(Dataset[dict[str, Any]]):
    """The samples of a selection by number: {field: value, "key": str}. Files are opened by the process that reads them.

    Args:
        fields: batch field -> member of the sample.
        size: pixels; the shorter side of a picture is brought to it and the middle kept.
    """

    def __init__(self, index: Index, selection: Selection, fields: Mapping[str, str], size: int) -> None:
        self.index, self.selection, self.fields, self.size = index, selection, dict(fields), size
        self.layouts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}  # of arrays, by member, as they were last
        self.mixed: Mixed = {}  # fields of several texts, of which a batch has one for each sample
        self.uneven: set[str] = set()  # members whose arrays are of several lengths
        self._files: Recent[int, FileIO] = Recent(OPEN_FILES, self._open)
        self._maps: Recent[int, memoryview] = Recent(OPEN_FILES, self._map)

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"There is no sample {i} among {len(self)}.")
        shard, row = self.selection.locate(i)
        view = View(self.size, self.size)
        sample = {field: self.read(shard, row, member, view) for field, member in self.fields.items()}
        return sample | {"key": self.index.table(shard).key(row)}

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        return [self.index.table(s).key(int(r)) for s in range(len(self.index.shards)) for r in self.selection.rows_of(s)]

    def captions(self, field: str = "caption") -> list[str]:
        """All captions, in order, without unpacking a picture."""
        if field not in self.fields:
            raise Refusal(f"The samples have no field {field!r}, only {', '.join(self.fields)}; add +data.fields.{field}=txt.")
        view, places = View(1, 1), map(self.selection.locate, range(len(self)))
        return [self.read(shard, row, self.fields[field], view) for shard, row in places]

    def read(self, shard: int, row: int, member: str, view: View, out: np.ndarray | None = None) -> Any:
        """One member, decoded.

        Args:
            shard, row: the sample's place in the index.
            member: which of its members.
            view: what of a picture is looked at.
            out: uint8 (height, width, 3), where a picture may be laid.

        Raises:
            BadSample: it cannot be read.
        """
        return decode(member, self._bytes(shard, row, member), view, self.where(shard, row), out)

    def copy_array(self, shard: int, row: int, member: str, header: bytes, out: memoryview) -> bool:
        """Copies an array out of the mapped shard, once -> whether it has the expected header.

        Args:
            shard, row: the sample's place in the index.
            member: which of its members.
            header: what its .npy file is expected to begin with.
            out: as many bytes as the array has.
        """
        offset, size = self.index.table(shard).span(row, member)
        mapped, begin, end = self._maps[shard], offset + len(header), offset + size
        if offset < 0 or end - begin != len(out) or end > len(mapped) or bytes(mapped[offset:begin]) != header:
            return False
        out[:] = mapped[begin:end]
        return True

    def at(self, position: int) -> None:
        """Told before the sample at this position of the order is read; what lies in shards does not depend on it."""

    def where(self, shard: int, row: int) -> Where:
        """Names a sample, for errors."""
        return Where(self.index, shard, row)

    def _bytes(self, shard: int, row: int, member: str) -> bytes:
        offset, size = self.index.table(shard).span(row, member)
        if offset < 0 or size > MAX_BYTES:
            raise BadSample(f"Member {member!r} of {self.where(shard, row)} is {'missing' if offset < 0 else 'too large'}.")
        file = self._files[shard].fileno()  # a shard that cannot be had at all ends the training, which goes on exactly later
        try:
            data = os.pread(file, size, offset)
        except OSError as error:
            raise BadSample(f"Member {member!r} of {self.where(shard, row)} cannot be read: {error!r}") from error
        if len(data) != size:
            raise BadSample(
                f"Member {member!r} of {self.where(shard, row)} ends after {len(data)} of {size} bytes: the shard has changed."
            )
        return data

    def _open(self, shard: int) -> FileIO:
        with self.index.fetch.held(self.index.shards[shard]) as path:
            return FileIO(path)

    def _map(self, shard: int) -> memoryview:
        return memoryview(mmap(self._files[shard].fileno(), 0, access=ACCESS_READ))


class Loaded(Dataset[dict[str, Any]]):
    """Places -> a batch, what a DataLoader asks for.

    Args:
        samples: what is read.
        others: for training, the selection that a bad sample is replaced from, by its picture's size; None leaves it out.
        crop, flip: where pictures are cut, and the share of them that is mirrored.
        seed: of both, and of what replaces a bad sample, by position.
    """

    def __init__(
        self,
        samples: Samples,
        others: Mapping[tuple[int, int], Selection] | None = None,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.samples, self.others, self.crop, self.flip, self.seed = samples, others, crop, flip, seed

    def __getitems__(self, places: Sequence[Place]) -> dict[str, Any]:
        """(B) places -> a batch; `bad` names the samples that could not be read, where there were any."""
        columns = {field: Column(self.samples, member, len(places)) for field, member in self.samples.fields.items()}
        kept, bad = [], []
        for place in places:
            for attempt in range(ATTEMPTS):
                shard, row = self._instead(place, attempt) if attempt else (place.shard, place.row)
                try:
                    self.samples.at(place.position)
                    view = cut(place.position, place.height, place.width, self.crop, self.flip, self.seed)
                    for column in columns.values():
                        column.put(len(kept), shard, row, view)
                except BadSample as error:
                    bad.append(str(error))
                    if self.others is None:
                        break
                else:
                    kept.append((place.position, shard, row, view))
                    break
        if not kept:
            raise Refusal(f"None of {len(places)} samples can be read: {bad[0]} Mend the shards: python -m ldm doctor.")
        batch = {field: column.result(len(kept)) for field, column in columns.items()}
        batch = draw(batch, self.samples.mixed, [position for position, *_ in kept], self.seed)
        batch |= {"key": [self.samples.index.table(s).key(r) for _, s, r, _ in kept]}
        batch |= {"position": torch.tensor([p for p, *_ in kept], dtype=torch.int64)}
        return batch | self._sizes(kept) | ({"bad": bad} if bad else {})

    def _instead(self, place: Place, attempt: int) -> tuple[int, int]:
        """Another sample of the same bucket, a function of the position and the attempt."""
        selection = self.others[place.height, place.width]
        return selection.locate(int(generator(self.seed, place.position, REPLACE, attempt).integers(len(selection))))

    def _sizes(self, kept: Sequence[tuple[int, int, int, View]]) -> dict[str, Tensor]:
        """SIZES, (B) int64 each, and `mirrored`, where there are pictures or records of how they were cut."""
        cut_ahead = self.samples.index.table(kept[0][1]).column(CROP[0]) is not None
        if not cut_ahead and not any(is_image(member) for member in self.samples.fields.values()):
            return {}
        rows = [told(partial(self.samples.index.table(s).number, row), view, cut_ahead) for _, s, row, view in kept]
        mirrored = {"mirrored": torch.tensor([view.flip for *_, view in kept])}
        return mirrored | dict(zip(SIZES, torch.tensor(rows, dtype=torch.int64).unbind(1)))


class Column:
    """One field of a batch as it fills: pictures and arrays in one tensor from the start, in memory that processes share."""

    def __init__(self, samples: Samples, member: str, count: int) -> None:
        self.samples, self.member, self.count = samples, member, count
        self.picture, self.header = is_image(member), b""
        self.values: list[Any] = []
        self.tensor: Tensor | None = None
        if member in samples.layouts and member not in samples.uneven:
            self._begin(*samples.layouts[member])

    def put(self, i: int, shard: int, row: int, view: View) -> None:
        """Reads the i-th value.

        Raises:
            BadSample: it cannot be read.
            ValueError: it has another shape than the first one.
        """
        if self.header:
            out = self.bytes[i * self.each : (i + 1) * self.each]
            if self.samples.copy_array(shard, row, self.member, self.header, out):
                return
        if self.picture and i == 0:
            self._begin(torch.uint8, (3, view.height, view.width))
        value = self.samples.read(shard, row, self.member, view, self.rows[i] if self.picture else None)
        if not isinstance(value, Tensor) or (self.tensor is None and self.member in self.samples.uneven):
            del self.values[i:]
            if self.values and isinstance(value, Tensor) and value.shape[1:] != self.values[0].shape[1:]:
                self._refuse(value.shape, self.values[0].shape, shard, row)
            self.values.append(value)
            return
        if i == 0 and not self.picture:
            self._begin(value.dtype, tuple(value.shape))
        if value.shape != self.tensor.shape[1:] and is_sequence(value) and value.shape[1:] == self.tensor.shape[2:]:
            self.samples.uneven.add(self.member)
            self.values, self.tensor, self.header = [*self.tensor[:i].clone(), value], None, b""
            return
        if value.shape != self.tensor.shape[1:]:
            self._refuse(value.shape, self.tensor.shape[1:], shard, row)
        if value.data_ptr() != self.tensor[i].data_ptr():
            self.tensor[i].copy_(value)

    def result(self, count: int) -> Any:
        """Tensors (count, ...), integers as int64 (count), all else a list. Sequences of several lengths are filled up with
        zeros to the longest."""
        if self.tensor is not None:
            return self.tensor[:count]
        values = self.values[:count]
        if isinstance(values[0], Tensor):
            filled = empty([count, max(map(len, values)), *values[0].shape[1:]], values[0].dtype).zero_()
            for row, value in zip(filled, values):
                row[: len(value)] = value
            return filled
        return torch.tensor(values, dtype=torch.int64) if isinstance(values[0], int) else values

    def _refuse(self, one: Sequence[int], other: Sequence[int], shard: int, row: int) -> None:
        raise Refusal(
            f"Member {self.member!r} has arrays of shapes {sorted({tuple(one), tuple(other)})}, which share no batch; the last "
            f"is of {self.samples.where(shard, row)} (data.fields)."
        )

    def _begin(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Pictures lie channels last, as decoders give them and convolutions like them."""
        if self.picture:
            flat = empty([self.count, *shape[1:], shape[0]], dtype)
            self.tensor, self.rows = flat.permute(0, 3, 1, 2), flat.numpy()
            return
        self.tensor = empty([self.count, *shape], dtype)
        if is_array(self.member):
            self.samples.layouts[self.member] = dtype, shape
            self.header, self.each = header_of(dtype, shape), math.prod(shape) * dtype.itemsize
            self.bytes = memoryview(self.tensor.numpy().reshape(-1).view(np.uint8))


def is_sequence(x: Tensor) -> bool:
    """Whether it is tokens, (L, D), or their mask, (L) bool, of which each sample may have as many as it has."""
    return x.ndim == 2 or (x.ndim == 1 and x.dtype == torch.bool)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that travels from a worker to its parent without a copy.

    Elsewhere NumPy's memory: it is taken again from batch to batch, while torch's is mapped, and zeroed, each time.
    """
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, numpy_type(dtype)))
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))


@cache
def header_of(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What a .npy file of such arrays begins with."""
    file = io.BytesIO()
    about = np.lib.format.header_data_from_array_1_0(np.empty(shape, numpy_type(dtype)))
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def numpy_type(dtype: torch.dtype) -> np.dtype:
    """NumPy's word for it."""
    return torch.empty(0, dtype=dtype).numpy().dtype


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) in [-1, 1], channels last."""
    return from_bytes(images.contiguous(memory_format=torch.channels_last))


def as_is(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, which is one already."""
    return batch


def loading(workers: int, again: bool) -> dict[str, Any]:
    """How a DataLoader is to load with that many processes, which stay for the next epoch where it is read `again`."""
    if workers:
        atexit.register(end_workers)
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0 and again,
        "worker_init_fn": stay,
        "pin_memory": torch.cuda.is_available(),
    }


def stay(_: int) -> None:
    """A worker that gets SIGTERM, as every process of a job does, goes on once: the training it feeds ends between two steps."""
    signal.signal(signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL))


def end_workers() -> None:
    """Ends them for good as this process exits, which would send them one SIGTERM and wait for ever."""
    for child in active_children():
        if child.daemon:
            child.kill()
