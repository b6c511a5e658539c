"""Learned uncertainty: the noise levels weigh themselves (EDM2, https://arxiv.org/abs/2312.02696)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Draw, InTraining


class Uncertainty(Regression):
    """E_t loss(t) / e^u(t) + u(t), of which the best u(t) is the log of the regression's loss(t): every level counts alike.

    u is linear in `width` random Fourier features of log(sigma / alpha), begins at 0, and is trained with the model; it takes
    no part in drawing.
    """

    def __init__(self, width: int = 128, **parts: Any) -> None:
        super().__init__(**parts)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequency", torch.randn(width, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(width, generator=generator))
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": (), "regression": ()}, the latter without the uncertainty."""
        loss, log_ratio = self.each(model.denoiser, x, cond, draw)
        u = self.u(log_ratio)
        return {"loss": (loss / u.exp() + u).mean(), "regression": loss.mean()}

    def u(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (B) -> u: (B)."""
        return self.head(math.sqrt(2) * torch.cos(log_ratio[:, None] * self.frequency + self.phase)).squeeze(1)
