"""The words of evaluation: what a metric is, what it sees of pictures, and what it says of them. Knows types.py alone"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from ldm.files.picture import to_bytes
from ldm.types import Batch

# What was seen of N pictures, one row each: (N, ...) by name.
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """A number, with its standard error where it is a mean over pictures, and a note where it is worth less than it seems."""

    value: float
    error: float | None = None
    note: str | None = None

    @classmethod
    def mean(cls, values: Tensor) -> Estimate:
        """values: (N), one a picture -> their mean and its standard error, std / sqrt(N); no error below two pictures."""
        values = values.double()
        error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
        return cls(values.mean().item(), error)


class Reference(Protocol):
    """The real pictures that a metric compares with, as its `look` sees them."""

    def rows(self) -> Rows:
        """What `look` saw of all of them, in order."""

    def kept(self, name: str, make: Callable[[Rows], Rows]) -> Rows:
        """make(rows), made once and kept on disk under `name`; or what a file of statistics holds."""


class Extractor(Protocol):
    """A frozen network that sees pictures one by one."""

    protocol: Mapping[str, Any]  # extractor, sha256 of its weights, resize: equal protocols, equal features

    def __call__(self, images: Tensor) -> Rows:
        """images: (B, 3, height, width) in [-1, 1] -> `features` (B, D), and whatever else it has to say, (B, ...) each."""


@runtime_checkable
class Published(Protocol):
    """An extractor of whose features others publish statistics, as `mu` and `sigma` in an .npz."""

    statistics: str  # what these are of, such as `inception`


class Metric(Protocol):
    """Numbers about a set of pictures.

    `look` sees the pictures a batch at a time, on any process, in any order; `compute` is given what it saw of all of them, in
    order, on one process. So rows are shared between metrics, kept on disk, and the number does not depend on who saw what.
    """

    of: str  # which pictures it judges: "drawing" or "reconstruction"
    against: str | None  # the real pictures that it sees as well: "reference", "train", or None
    protocol: Mapping[str, Any]  # plain values that say what `look` depends on; metrics of equal protocols share rows

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, height, width) in [-1, 1], on the grid of 8 bits; batch: what they answer to -> (B, ...) each.

        A row must depend on its own picture and request alone. Real pictures come with themselves as `batch["image"]`.
        """

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """rows: (N, ...) each, in order -> the numbers, by name."""


@runtime_checkable
class Showing(Protocol):
    """A metric that has something to show once it has computed."""

    def show(self, pictures: Callable[[Sequence[int]], Tensor], real: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Makers of judged and real pictures by number, (B, 3, h, w) in [-1, 1] -> pictures in two rows, (2 B, 3, h, w)."""


@runtime_checkable
class FromMoments(Protocol):
    """A metric that of a reference needs no more than statistics of its features."""

    def knows(self, statistics: str) -> bool:
        """Whether statistics of these features, such as `inception`, do."""


def transformed(images: Tensor, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """(B, 3, h, w) in [-1, 1] -> each as a PIL picture through its network's own transform, (B, ...), on the same device."""
    pictures = [Image.fromarray(pixels.numpy()) for pixels in to_bytes(images).permute(0, 2, 3, 1).cpu()]
    return torch.stack([transform(picture) for picture in pictures]).to(images.device)
