"""The next batch on its way to a GPU while the step before it is under way."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ldm.types import Batch


class Ahead:
    """A loader's batches on a GPU: each is copied as soon as it is fetched, one ahead of the one that is given out.

    The copy runs on a stream of its own, from pinned memory, beside what the GPU computes. Whoever is given a batch may use it
    on the current stream, which waits for the copy, and for nothing else.

    Args:
        loader: batches in pinned memory, on the processor.
        move: batch -> the same on the GPU, by copies that do not wait (`non_blocking`).
    """

    def __init__(self, loader: Iterable[Batch], move: Callable[[Batch], Batch], device: torch.device) -> None:
        self.loader, self.move, self.device = loader, move, device

    def __iter__(self) -> Iterator[Batch]:
        stream, under_way = torch.cuda.Stream(self.device), None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                moved = self.move(batch)
            copied = stream.record_event()
            if under_way is not None:
                yield self._arrived(*under_way)
            under_way = moved, copied
        if under_way is not None:
            yield self._arrived(*under_way)

    def _arrived(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        """The batch, safe on the current stream; its memory is not given to a later copy before that stream is done with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        apply_to_collection(batch, Tensor, lambda value: value.record_stream(current) if value.is_cuda else None)
        return batch


def ahead(loader: Iterable[Batch], trainer: Any) -> Iterable[Batch]:
    """The loader, its batches copied ahead of their use where a trainer runs on a GPU; as it is everywhere else."""
    device = None if trainer is None else trainer.strategy.root_device
    if device is None or device.type != "cuda":
        return loader
    stage = trainer.lightning_module
    return Ahead(loader, lambda batch: stage.transfer_batch_to_device(batch, device, 0), device)
