"""How weights lie in memory: channels last where convolutions are quicker so, and the optimizer's state as its weights; and
whether cuDNN looks for the quickest convolutions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SEARCHED = 10_000_000  # numbers in all convolutions of a stage from which cuDNN's search pays
CHANNELS_LAST = ("cuda",)  # kinds of devices; on a CPU a U-Net takes 1 to 5 % longer so


def lay_out(parts: Iterable[nn.Module], device: torch.device) -> None:
    """Lays convolutions' weights as the device likes them."""
    for part in parts if device.type in CHANNELS_LAST else ():
        part.to(memory_format=torch.channels_last)


def pays_to_search(stage: nn.Module) -> bool:
    """Whether cuDNN's search for the quickest convolution of each shape, forward and backward, is worth its time.

    It took 26 s before the first step on an H200 (torch 2.11), of an emoji's U-Net and of Stable Diffusion 2's alike; what it
    finds counts where kernels are large.
    """
    kernels = (module.weight.numel() for module in stage.modules() if isinstance(module, nn.Conv2d))
    return sum(kernels) >= SEARCHED


def lay_state_out(optimizer: Optimizer) -> None:
    """Lays moments as their weights lie: a fused kernel walks through both in memory's order, and says nothing if it differs.

    They do differ where the checkpoint is of a run on another device.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
