"""Rows: what metrics see of each picture, such as its features, computed once, over all processes, and kept on disk.

A picture's batch follows from its number alone, and batches go to the processes in turn, so that every batch holds the same
pictures for any number of processes. The last one is filled up with its last picture and cut again, so that all have one size.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ldm.files.folder import save_tensors
from ldm.files.process import rank, wait, world
from ldm.files.weights import load_tensors
from ldm.measure import Rows
from ldm.types import Batch

SECONDS = 30  # between two times that rows are written
Look = Callable[[Tensor, Batch], Rows]


class Source(Protocol):
    """Pictures by number, from 0 to `count` - 1."""

    count: int
    protocol: Mapping[str, Any]  # plain values; sources of equal protocols have equal pictures

    def fields(self, numbers: Sequence[int]) -> Batch:
        """B numbers -> the pictures' fields, such as their captions; `corrupt` (B) bool where some may be unreadable."""

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """B numbers and their fields -> the pictures, (B, 3, h, w) in [-1, 1]."""


@runtime_checkable
class Summarised(Protocol):
    """A source that may have published statistics of its pictures' features."""

    features: str  # of which network, such as `inception`

    def moments(self) -> Rows | None:
        """-> mean (D) and covariance (D, D) in float64; None where there are none."""


def fingerprint(*parts: Any) -> str:
    """Plain values -> 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """A folder of rows, in files as they were computed; each row has its picture's number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.waiting, self.since = folder, [], time.monotonic()

    def done(self) -> set[int]:
        """-> the numbers of the pictures that are done, unreadable ones included."""
        return set(self._numbers("number")) | set(self._numbers("corrupt"))

    def add(self, number: Tensor, corrupt: Tensor, rows: Rows) -> None:
        """Adds the rows of B pictures, (B, ...) each, to what `flush` writes; number: (B), corrupt: (B) bool. Every SECONDS it is
        written.
        """
        readable = {name: value[~corrupt].detach().cpu() for name, value in rows.items()}
        self.waiting.append({**readable, "number": number[~corrupt], "corrupt": number[corrupt]})
        if time.monotonic() - self.since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are not written yet."""
        if self.waiting:
            part = {name: torch.cat([p[name] for p in self.waiting]) for name in self.waiting[0]}
            first = min(torch.cat((part["number"], part["corrupt"])).tolist())
            save_tensors(part, self.folder / f"{first:09d}.safetensors")
        self.waiting, self.since = [], time.monotonic()

    def corrupt(self) -> list[int]:
        """-> the numbers of the pictures that could not be read."""
        return sorted(set(self._numbers("corrupt")))

    def rows(self) -> dict[str, Tensor]:
        """-> all rows, (N, ...) each, in the order of their pictures' numbers; `number` (N) is among them."""
        parts = [load_tensors(path) for path in self._parts()]
        joined = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name != "corrupt"}
        numbers = joined["number"].tolist()
        first = {n: i for i, n in reversed(list(enumerate(numbers)))}
        order = torch.tensor([first[n] for n in sorted(first)], dtype=torch.int64)
        return {name: value[order] for name, value in joined.items()}

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def _numbers(self, name: str) -> list[int]:
        """-> `number` or `corrupt` of all files, without reading the rows."""
        numbers: list[int] = []
        for path in self._parts():
            with safe_open(path, "pt") as part:
                numbers += part.get_tensor(name).tolist()
        return numbers


class Seen:
    """measure.py's `Reference`: rows of real pictures, and what is made of them, on disk."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._rows: Rows = {}

    def rows(self) -> Rows:
        """-> all rows, in order, read once."""
        self._rows = self._rows or self.store.rows()
        return self._rows

    def kept(self, name: str, make: Callable[[Rows], Rows]) -> Rows:
        """-> make(rows), from FOLDER/name.safetensors where it was made before."""
        path = self.store.folder / f"{name}.safetensors"
        if not path.is_file():
            save_tensors(make(self.rows()), path)
        return load_tensors(path)


@torch.no_grad()
def see(source: Source, looks: Mapping[str, Look], folder: Path, batch: int, doing: str) -> dict[str, Store]:
    """Calls every look with every picture of a source whose row is not there yet -> stores by name, complete, on every process.

    Args:
        source: of the pictures.
        looks: metrics' `look` by name.
        folder: where the stores are, FOLDER/name each.
        batch: pictures at a time.
        doing: words for the progress bar.
    """
    stores = {name: Store(folder / name) for name in looks}
    done = {name: store.done() for name, store in stores.items()}
    wait()
    mine = [range(a, min(a + batch, source.count)) for a in range(rank() * batch, source.count, world() * batch)]
    left = [(part, [name for name in looks if not done[name].issuperset(part)]) for part in mine]
    left = [(part, names) for part, names in left if names]
    where = f"{doing} ({world()} processes)" if world() > 1 else doing
    progress = tqdm(total=sum(len(part) for part, _ in left), desc=where, unit="picture", disable=rank() > 0 or not left)
    for part, names in left:
        numbers = [min(n, part[-1]) for n in range(part[0], part[0] + batch)]
        fields = source.fields(numbers)
        images = source.images(numbers, fields)
        corrupt = fields.get("corrupt", torch.zeros(batch, dtype=torch.bool))[: len(part)]
        for name in names:
            rows = {key: value[: len(part)] for key, value in looks[name](images, fields).items()}
            stores[name].add(torch.tensor(part), corrupt, rows)
        progress.update(len(part))
    progress.close()
    for store in stores.values():
        store.flush()
    wait()
    return stores
