"""What the network is asked to say, and how to read its answer.

`target` and `to_data` are inverse to each other: whatever the schedule,
to_data(target(x, noise), alpha * x + sigma * noise) is x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """The clean latents themselves."""

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return x

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        return output


@dataclass(frozen=True)
class Noise:
    """The noise that was added (DDPM, https://arxiv.org/abs/2006.11239, equation 14)."""

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return noise

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        return (x_t - sigma * output) / alpha


@dataclass(frozen=True)
class Flow:
    """noise - x, the constant speed along a straight path (https://arxiv.org/abs/2209.03003)."""

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return noise - x

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        return (x_t - sigma * output) / (alpha + sigma)


@dataclass(frozen=True)
class Velocity:
    """v-prediction (https://arxiv.org/abs/2202.00512); for unit-variance latents also EDM's preconditioning, up to sign."""

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return (alpha * noise - sigma * x) / torch.hypot(alpha, sigma)

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        r = torch.hypot(alpha, sigma)
        return (alpha / r * x_t - sigma * output) / r
