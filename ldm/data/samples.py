"""Samples by number, and batches of them: members are read at their offsets and laid straight into the batch."""

from __future__ import annotations

import io
import math
import os
import signal
from collections.abc import Mapping, Sequence
from io import FileIO
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm.data.decode import MAX_BYTES, BadSample, View, decode, is_array, is_image
from ldm.data.index import Index
from ldm.data.order import Place, generator
from ldm.data.recent import Recent
from ldm.data.selection import Selection

OPEN_FILES = 128  # shards a process holds open
ATTEMPTS = 100  # substitutes that are tried for one bad sample
AUGMENT, REPLACE = 2**32 + 2, 2**32 + 3  # streams of random numbers
SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")


class Samples(Dataset[dict[str, Any]]):
    """The samples of a selection by number: {field: value, "key": str}. Files are opened by the process that reads them.

    Args:
        fields: batch field -> member of the sample.
        size: pixels; the shorter side of a picture is brought to it and the middle kept.
    """

    def __init__(self, index: Index, selection: Selection, fields: Mapping[str, str], size: int) -> None:
        self.index, self.selection, self.fields, self.size = index, selection, dict(fields), size
        self._files: Recent[int, FileIO] = Recent(OPEN_FILES, self._open)

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
            raise ValueError(f"The samples have no field {field!r}, only {', '.join(self.fields)}; add +data.fields.{field}=txt.")
        view, places = View(1, 1), map(self.selection.locate, range(len(self)))
        return [self.read(shard, row, self.fields[field], view) for shard, row in places]

    def read(self, shard: int, row: int, member: str, view: View) -> Any:
        """One member, decoded.

        Raises:
            BadSample: it cannot be read.
        """
        return decode(member, self._bytes(shard, row, member), view, where=self.where(shard, row))

    def read_array(self, shard: int, row: int, member: str, header: bytes, out: memoryview) -> bool:
        """Reads an array straight into `out`; -> whether it has the header that was expected of it."""
        offset, size = self.index.table(shard).span(row, member)
        if offset < 0 or size != len(header) + len(out):
            return False
        found = bytearray(len(header))
        return os.preadv(self._files[shard].fileno(), [found, out], offset) == size and found == header

    def where(self, shard: int, row: int) -> str:
        """Names a sample, for errors."""
        return f"sample {self.index.table(shard).key(row)!r} in {self.index.shards[shard]}"

    def _bytes(self, shard: int, row: int, member: str) -> bytes:
        offset, size = self.index.table(shard).span(row, member)
        if offset < 0 or size > MAX_BYTES:
            raise BadSample(f"Member {member!r} of {self.where(shard, row)} is {'missing' if offset < 0 else 'too large'}.")
        try:
            data = os.pread(self._files[shard].fileno(), size, offset)
        except OSError as error:
            raise BadSample(f"Member {member!r} of {self.where(shard, row)} cannot be read: {error!r}") from error
        if len(data) != size:
            raise BadSample(
                f"Member {member!r} of {self.where(shard, row)} ends after {len(data)} of {size} bytes: the shard has changed."
            )
        return data

    def _open(self, shard: int) -> FileIO:
        return FileIO(self.index.fetch(self.index.shards[shard]))


class Loaded(Dataset[dict[str, Any]]):
    """Places -> a batch, what a DataLoader asks for.

    Args:
        others: for training, the selection that a bad sample is replaced from, by its picture's size; None leaves it out.
        crop, flip: where pictures are cut, and the share of them that is mirrored; functions of (seed, position).
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
                    view = self._view(place)
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
            raise ValueError(f"None of {len(places)} samples can be read: {bad[0]}")
        batch = {field: column.result(len(kept)) for field, column in columns.items()}
        batch |= {"key": [self.samples.index.table(s).key(r) for _, s, r, _ in kept]}
        batch |= {"position": torch.tensor([p for p, *_ in kept], dtype=torch.int64)}
        return batch | self._sizes(kept) | ({"bad": bad} if bad else {})

    def _instead(self, place: Place, attempt: int) -> tuple[int, int]:
        """Another sample of the same bucket, a function of the position and the attempt."""
        selection = self.others[place.height, place.width]
        return selection.locate(int(generator(self.seed, place.position, REPLACE, attempt).integers(len(selection))))

    def _view(self, place: Place) -> View:
        if self.crop == "center" and not self.flip:
            return View(place.height, place.width)
        v, u, mirror = generator(self.seed, place.position, AUGMENT).random(3).tolist()
        v, u = (v, u) if self.crop == "random" else (0.5, 0.5)
        return View(place.height, place.width, v, u, mirror < self.flip)

    def _sizes(self, kept: Sequence[tuple[int, int, int, View]]) -> dict[str, Tensor]:
        """What SDXL is told of each picture (https://arxiv.org/abs/2307.01952, 2.2): (B) int64 each."""
        if not any(is_image(member) for member in self.samples.fields.values()):
            return {}
        rows = []
        for _, shard, row, view in kept:
            table = self.samples.index.table(shard)
            width, height = (table.number(row, side) for side in ("width", "height"))
            original = [table.number(row, f"original_{side}") for side in ("height", "width")]
            known = not math.isnan(width) and not math.isnan(height)
            corner = view.corner(int(width), int(height)) if known else (0, 0)
            rows.append([*(int(n) if not math.isnan(n) else 0 for n in original), *corner, view.height, view.width])
        mirrored = {"mirrored": torch.tensor([view.flip for *_, view in kept])}
        return mirrored | dict(zip(SIZES, torch.tensor(rows, dtype=torch.int64).unbind(1)))


class Column:
    """One field of a batch as it fills: pictures and arrays in one tensor from the start, in memory that processes share."""

    def __init__(self, samples: Samples, member: str, count: int) -> None:
        self.samples, self.member, self.count = samples, member, count
        self.values: list[Any] = []
        self.tensor: Tensor | None = None
        self.header = b""

    def put(self, i: int, shard: int, row: int, view: View) -> None:
        """Reads the i-th value.

        Raises:
            BadSample: it cannot be read, or has another shape than the first one's.
        """
        if self.header and self.samples.read_array(shard, row, self.member, self.header, self.rows[i]):
            return
        value = self.samples.read(shard, row, self.member, view)
        if not isinstance(value, Tensor):
            del self.values[i:]
            self.values.append(value)
            return
        if self.tensor is None:
            self._begin(value)
        if value.shape != self.tensor.shape[1:]:
            raise ValueError(
                f"Member {self.member!r} has arrays of shapes {sorted({tuple(value.shape), tuple(self.tensor.shape[1:])})}, "
                f"which share no batch; the last is of {self.samples.where(shard, row)} (data.fields)."
            )
        self.tensor[i].copy_(value)

    def result(self, count: int) -> Any:
        """Tensors (count, ...), integers as int64 (count), all else a list."""
        if self.tensor is not None:
            return self.tensor[:count]
        values = self.values[:count]
        return torch.tensor(values, dtype=torch.int64) if isinstance(values[0], int) else values

    def _begin(self, value: Tensor) -> None:
        """Pictures lie channels last, as decoders give them and convolutions like them."""
        shape = (self.count, *value.shape)
        picture = is_image(self.member)
        self.tensor = empty([shape[0], shape[2], shape[3], shape[1]], value.dtype) if picture else empty(shape, value.dtype)
        self.tensor = self.tensor.permute(0, 3, 1, 2) if picture else self.tensor
        if is_array(self.member):
            self.header = header_of(value.numpy())
            self.rows = [memoryview(row).cast("B") for row in self.tensor.view(self.count, -1).numpy()]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that travels from a worker to its parent without a copy."""
    if get_worker_info() is None:
        return torch.empty(*shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))


def header_of(array: np.ndarray) -> bytes:
    """What a .npy file of such an array begins with."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue()


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) in [-1, 1], channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def as_is(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, which is one already."""
    return batch


def stay(_: int) -> None:
    """A worker that gets SIGTERM, as every process of a job does, goes on once: the training it feeds ends between two steps."""
    signal.signal(signal.SIGTERM, lambda signum, _: signal.signal(signum, signal.SIG_DFL))
