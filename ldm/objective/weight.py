"""How much each noise level counts: a weight of ||x_hat - x||^2, told as a factor of the network's own squared error.

The two differ by gain^2, where gain = |d x_hat / d output| is the prediction's: 1 for data, sigma / alpha for noise. So one
formula serves every prediction. Latents have unit variance, hence SNR = alpha^2 / sigma^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """The network's own error, whatever it predicts (DDPM's simple loss, equation 14, for noise)."""

    def __call__(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        """(B) each -> (B)."""
        return torch.ones_like(gain)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) (https://arxiv.org/abs/2303.09556, equation 7)."""

    gamma: float = 5.0

    def __call__(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        """(B) each -> (B)."""
        return (alpha / sigma).square().clamp(max=self.gamma) * gain**2


@dataclass(frozen=True)
class SoftMinSNR:
    """SNR gamma / (SNR + gamma), min-SNR without its corner (HDiT, https://arxiv.org/abs/2401.11605)."""

    gamma: float = 4.0

    def __call__(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        """(B) each -> (B)."""
        return self.gamma * alpha**2 / (alpha**2 + self.gamma * sigma**2) * gain**2


@dataclass(frozen=True)
class EDM:
    """SNR + 1, which leaves an untrained network with an error of 1 at every level (https://arxiv.org/abs/2206.00364, table 1).

    With velocity prediction it is plain.
    """

    def __call__(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        """(B) each -> (B)."""
        return (1 + (alpha / sigma) ** 2) * gain**2
