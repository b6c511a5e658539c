"""The global batch where samples must see each other: the same on any number of processes."""

import torch
from torch import Tensor

from ldm.files.process import rank, world


def together(position: Tensor, *values: Tensor) -> tuple[list[Tensor], Tensor]:
    """position: (B), values: (B, ...) of this process -> those of all, (N, ...) each, by position, and which are these: (B).

    In training only: validation may have fewer samples on one process than on another, which sees its own there. A micro-batch
    of gradient accumulation is a batch of its own.
    """
    count, here = len(position), 0
    position = position.to(values[0].device, non_blocking=True)
    if torch.is_grad_enabled() and world() > 1:
        here = rank() * count
        position, *values = (_gathered(value.detach().contiguous()) for value in (position, *values))
    order = position.argsort(stable=True)
    return [value[order] for value in values], order.argsort()[here : here + count]


def _gathered(value: Tensor) -> Tensor:
    parts = [torch.empty_like(value) for _ in range(world())]
    torch.distributed.all_gather(parts, value)
    return torch.cat(parts)
