"""What the network predicts, and how its output becomes an estimate of the data.

           target of training                                x_hat from the output v
Data       x                                                 v
Noise      noise                                             (x_t - sigma v) / alpha
Flow       noise - x                                         (x_t - sigma v) / (alpha + sigma)
Velocity   (alpha noise - sigma x) / sqrt(alpha^2 + sigma^2)  (alpha x_t / r - sigma v) / r,  r = sqrt(alpha^2 + sigma^2)

`target` and `to_data` are inverse to each other: whatever the schedule, to_data(target(x, noise), alpha x + sigma noise) is x.
All tensors are (B, C, H, W), alpha and sigma broadcast over them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """The clean latents themselves (x-prediction)."""

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return x

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        return output


@dataclass(frozen=True)
class Noise:
    """The noise that was added (epsilon-prediction; DDPM, https://arxiv.org/abs/2006.11239, equation 14)."""

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return noise

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        return (x_t - sigma * output) / alpha


@dataclass(frozen=True)
class Flow:
    """noise - x, the constant velocity along a straight path (rectified flow, https://arxiv.org/abs/2209.03003, equation 1)."""

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return noise - x

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        return (x_t - sigma * output) / (alpha + sigma)


@dataclass(frozen=True)
class Velocity:
    """v-prediction (https://arxiv.org/abs/2202.00512, appendix D), divided by sqrt(alpha^2 + sigma^2), which is 1 there.

    For unit-variance latents it is also EDM's preconditioned target, up to its sign.
    """

    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> (B, C, H, W)."""
        return (alpha * noise - sigma * x) / torch.hypot(alpha, sigma)

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B, C, H, W) each -> x_hat: (B, C, H, W)."""
        r = torch.hypot(alpha, sigma)
        return (alpha / r * x_t - sigma * output) / r
