"""The fresh noise of stochastic samplers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.types import mix


class Streams:
    """A stream of unit normal numbers for each picture, from its seed, so that a picture never depends on its batch.

    The numbers are drawn on the CPU, so that devices agree, and differ from those of the picture's starting noise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(mix(seed, 1)) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> the next numbers of each stream, (B, C, H, W), on x's device and of its dtype."""
        return torch.stack([torch.randn(*x.shape[1:], generator=g) for g in self.generators]).to(x)
