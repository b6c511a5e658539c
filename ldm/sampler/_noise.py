"""The noise that stochastic samplers add on the way."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.types import mix


class Streams:
    """One stream of unit normal numbers for each picture, from its seed: a picture never depends on its batch.

    They are drawn on the CPU, so that devices agree, and are not the numbers that its starting noise is drawn from.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(mix(seed, 1)) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> the next numbers of each stream: (B, C, H, W), of x's device and dtype."""
        return torch.stack([torch.randn(*x.shape[1:], generator=g) for g in self.generators]).to(x)
