"""Noise schedules: t -> (alpha, sigma), and back from log(sigma / alpha). A few lines each, to be read side by side.

Floors keep both scales above zero, so that no formula elsewhere needs a special case at its ends.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Straight paths from data to noise (rectified flow, https://arxiv.org/abs/2209.03003)."""

    floor: float = 1e-3

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*), alpha + sigma = 1."""
        sigma = self.floor + (1 - 2 * self.floor) * t
        return 1 - sigma, sigma

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        return ((torch.sigmoid(log_ratio) - self.floor) / (1 - 2 * self.floor)).clamp(0, 1)


@dataclass(frozen=True)
class Cosine:
    """Variance preserving, alpha^2 + sigma^2 = 1 (https://arxiv.org/abs/2102.09672, equation 17 without its offset)."""

    floor: float = 1e-3

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*)."""
        angle = (self.floor + (1 - 2 * self.floor) * t) * math.pi / 2
        return torch.cos(angle), torch.sin(angle)

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        return ((torch.atan(log_ratio.exp()) * 2 / math.pi - self.floor) / (1 - 2 * self.floor)).clamp(0, 1)


@dataclass(frozen=True)
class Karras:
    """Variance exploding, sigma^(1/rho) linear in t (EDM, https://arxiv.org/abs/2206.00364, equation 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*) of ones, sigma: (*)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + (high - low) * t) ** self.rho

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (((log_ratio / self.rho).exp() - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class ScaledLinear:
    """Stable Diffusion's: sqrt(beta) linear over discrete steps (https://arxiv.org/abs/2112.10752, appendix).

    Step n of N is t = (n + 1) / N; between steps log(sigma / alpha) is linear in t. Below the first step it falls to
    log(`floor`) at t = 0.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    floor: float = 1e-3
    table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64) ** 2
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        log_ratio = ((1 - alpha_bar) / alpha_bar).log() / 2
        start = torch.tensor([math.log(self.floor)], dtype=torch.float64)
        object.__setattr__(self, "table", torch.cat((start, log_ratio)))

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*), alpha^2 + sigma^2 = 1."""
        table, place = self.table.to(t.device), t.double().clamp(0, 1) * self.steps
        low = place.floor().long().clamp(max=self.steps - 1)
        log_ratio = torch.lerp(table[low], table[low + 1], place - low)
        return torch.sigmoid(-2 * log_ratio).sqrt().to(t), torch.sigmoid(2 * log_ratio).sqrt().to(t)

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        table, ratio = self.table.to(log_ratio.device), log_ratio.double().contiguous()
        low = (torch.searchsorted(table, ratio) - 1).clamp(0, self.steps - 1)
        place = low + (ratio - table[low]) / (table[low + 1] - table[low])
        return (place / self.steps).clamp(0, 1).to(log_ratio)
