"""The noise to train with."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ldm.objective._together import together
from ldm.types import Draw


@dataclass(frozen=True)
class Normal:
    """Unit normal, every number by itself."""

    def __call__(self, draw: Draw, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        return draw.normal("noise", x.shape[1:]).to(x, non_blocking=True)


@dataclass(frozen=True)
class Offset:
    """Besides, each channel as a whole moves by `strength`: pictures can then become all dark or all bright.

    https://www.crosslabs.org/blog/diffusion-with-offset-noise (2023); its strength is 0.1.
    """

    strength: float = 0.1

    def __call__(self, draw: Draw, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        noise, offset = draw.normal("noise", x.shape[1:]), draw.normal("offset", (x.shape[1], 1, 1))
        return (noise + self.strength * offset).to(x, non_blocking=True)


@dataclass(frozen=True)
class Coupled:
    """Unit normal, given to those latents of the global batch that make all paths together shortest.

    Minibatch optimal transport (https://arxiv.org/abs/2302.00482, section 3.3): the sum of ||noise - x||^2 is the least there is.
    Over all conditions alike, so that with conditions noise says a little of them (https://arxiv.org/abs/2503.10636).
    """

    def __call__(self, draw: Draw, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        (every, noise), place = together(draw.position, x, draw.normal("noise", x.shape[1:]).to(x))
        nearness = every.flatten(1).double().cpu() @ noise.flatten(1).double().cpu().T
        _, chosen = linear_sum_assignment(nearness.numpy(), maximize=True)
        return noise[torch.from_numpy(chosen).to(place)[place]]
