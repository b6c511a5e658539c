"""How weights lie in memory: channels last where convolutions are quicker so, and the optimizer's state as its weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

CHANNELS_LAST = ("cuda",)  # kinds of devices; on a CPU a U-Net takes 1 to 5 % longer so


def lay_out(parts: Iterable[nn.Module], device: torch.device) -> None:
    """Lays convolutions' weights as the device likes them."""
    for part in parts if device.type in CHANNELS_LAST else ():
        part.to(memory_format=torch.channels_last)


def lay_state_out(optimizer: Optimizer) -> None:
    """Lays moments as their weights lie: a fused kernel walks through both in memory's order, and says nothing if it differs.

    They do differ where the checkpoint is of a run on another device.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
