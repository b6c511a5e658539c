"""Which times to train on: numbers in [0, 1), stratified over the global batch -> t."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.types import Schedule


@dataclass(frozen=True)
class Uniform:
    """Every time alike."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return u


@dataclass(frozen=True)
class LogitNormal:
    """More of the middle of the times (SD3, https://arxiv.org/abs/2403.03206, equation 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return torch.sigmoid(self.mean + self.std * _normal(u))


@dataclass(frozen=True)
class LogNormal:
    """log(sigma / alpha) normal, whatever the schedule (EDM, https://arxiv.org/abs/2206.00364, table 1).

    EDM's data has std 0.5 and ours 1, which adds log(2) to the mean: its (-1.2, 1.2) is (-0.5, 1.2) here, and EDM2's
    (-0.4, 1.0) is (0.3, 1.0). What falls beyond the schedule's ends is trained at its ends.
    """

    mean: float = -0.5
    std: float = 1.2

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return schedule.inverse(self.mean + self.std * _normal(u))


def _normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
