"""The times a sampler visits, from first (noise) down to last (data)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.types import Schedule


@dataclass(frozen=True)
class Uniform:
    """Equal steps in t. shift > 1 spends more of them on noise (SD3, https://arxiv.org/abs/2403.03206, equation 23)."""

    first: float = 1.0
    last: float = 0.0
    shift: float = 1.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        t = torch.linspace(self.first, self.last, steps + 1, dtype=torch.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)


UNIFORM = Uniform()
