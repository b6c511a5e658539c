"""Which times to train on: numbers in [0, 1), stratified over the global batch -> t."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """Every time alike."""

    def __call__(self, u: Tensor) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return u


@dataclass(frozen=True)
class LogitNormal:
    """More of the middle (SD3, https://arxiv.org/abs/2403.03206, equation 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
