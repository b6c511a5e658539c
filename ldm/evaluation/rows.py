"""What metrics see of pictures, extracted once, split exactly over processes, and kept on disk so that nothing is done twice.

A picture belongs to a batch by its number alone, and batches go to the processes in turn: every batch holds the same pictures,
whatever the number of processes. The last one is filled up with its last picture and cut again, so that all have one size.
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

SECONDS = 30  # between two writings of what was seen
Look = Callable[[Tensor, Batch], Rows]


class Source(Protocol):
    """Pictures by number.

    protocol: plain values; sources of equal protocols have equal pictures.
    """

    count: int
    protocol: Mapping[str, Any]

    def fields(self, numbers: Sequence[int]) -> Batch:
        """What the pictures answer to; `corrupt` (B) bool where some may be unreadable."""

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """-> (B, 3, h, w) in [-1, 1]."""


@runtime_checkable
class Summarised(Protocol):
    """A source that may bring statistics of its pictures' features."""

    features: str  # of which network, such as `inception`

    def moments(self) -> Rows | None:
        """mean (D), covariance (D, D) in float64; None where there are none."""


def fingerprint(*parts: Any) -> str:
    """Plain values -> 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """A folder of rows, in parts as they were made; each row under its picture's number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.waiting, self.since = folder, [], time.monotonic()

    def done(self) -> set[int]:
        """The numbers of the pictures that were seen, unreadable ones among them."""
        return set(self._numbers("number")) | set(self._numbers("corrupt"))

    def add(self, number: Tensor, corrupt: Tensor, rows: Rows) -> None:
        """number: (B), corrupt: (B) bool, rows: (B, ...) each. Written now and then, and by `flush`."""
        kept = {name: value[~corrupt].detach().cpu() for name, value in rows.items()}
        self.waiting.append({**kept, "number": number[~corrupt], "corrupt": number[corrupt]})
        if time.monotonic() - self.since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was not written yet."""
        if self.waiting:
            part = {name: torch.cat([p[name] for p in self.waiting]) for name in self.waiting[0]}
            first = min(torch.cat((part["number"], part["corrupt"])).tolist())
            save_tensors(part, self.folder / f"{first:09d}.safetensors")
        self.waiting, self.since = [], time.monotonic()

    def corrupt(self) -> list[int]:
        """The numbers of the pictures that could not be read."""
        return sorted(set(self._numbers("corrupt")))

    def rows(self) -> dict[str, Tensor]:
        """All rows, in the order of their pictures' numbers; `number` among them."""
        parts = [load_tensors(path) for path in self._parts()]
        joined = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name != "corrupt"}
        numbers = joined["number"].tolist()
        first = {n: i for i, n in reversed(list(enumerate(numbers)))}
        order = torch.tensor([first[n] for n in sorted(first)], dtype=torch.int64)
        return {name: value[order] for name, value in joined.items()}

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def _numbers(self, name: str) -> list[int]:
        """`number` or `corrupt` of all parts, without reading the rows."""
        found: list[int] = []
        for path in self._parts():
            with safe_open(path, "pt") as part:
                found += part.get_tensor(name).tolist()
        return found


class Seen:
    """A set of real pictures as a metric compares with it: rows, and what is made of them, on disk."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._rows: Rows = {}

    def rows(self) -> Rows:
        """All rows, in order, read once."""
        self._rows = self._rows or self.store.rows()
        return self._rows

    def kept(self, name: str, make: Callable[[Rows], Rows]) -> Rows:
        """make(rows), from FOLDER/name.safetensors where it was made before."""
        path = self.store.folder / f"{name}.safetensors"
        if not path.is_file():
            save_tensors(make(self.rows()), path)
        return load_tensors(path)


@torch.no_grad()
def see(source: Source, looks: Mapping[str, Look], folder: Path, batch: int, doing: str) -> dict[str, Store]:
    """Shows every picture of `source` to every look that has not seen it -> a store for each, complete, on every process.

    Raises:
        ValueError: more pictures are unreadable than the source allows.
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
