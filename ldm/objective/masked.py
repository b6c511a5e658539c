"""Masked training: the network sees some of the patches, and answers for those (https://arxiv.org/abs/2306.09305, section 3.2).

    E weight(t) mean over seen patches of distance(output - target)

Without the paper's second network, which guesses what was not seen.
"""

from typing import Any

import torch
from torch import Tensor

from ldm.nn.route import Route
from ldm.objective.regression import Regression
from ldm.objective.route import blocks_of, check_rate, kept_of, routed
from ldm.types import Batch, Cond, Draw, InTraining


class Masked(Regression):
    """Regression on the patches that go through the blocks; the others go through none.

    Args:
        rate: the share of the patches that are left out, in [0, 1); 0 is regression.
        until: the step from which on all are seen, as the network will see them when it draws; None: never.
        **parts: time, weight, noise and distance, as in regression.

    Raises:
        Refusal: a share outside [0, 1), or a backbone whose blocks take no fewer patches, or that joins some (`fuse`).
    """

    def __init__(self, rate: float = 0.5, until: int | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        check_rate(rate)
        self.rate, self.until = rate, until

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": ()}."""
        denoiser = model.denoiser
        first, last = blocks_of(denoiser.backbone, 1, -1)
        if not self.training or not self.rate or (self.until is not None and draw.step >= self.until):
            return super().forward(model, batch, x, cond, draw)
        places = kept_of(denoiser.backbone, x, draw, self.rate)
        t, noise, alpha, sigma = self.drawn(x, denoiser.schedule, draw)
        with routed(denoiser.backbone, Route(first, last, places)):
            output = denoiser.output(alpha * x + sigma * noise, t, cond)
        seen = seen_of(places, denoiser.backbone.patch, x)
        error = seen * (output - denoiser.prediction.target(x, noise, alpha, sigma))
        return {"loss": self.error(denoiser, error, t).mean() / seen[:1].mean()}


def seen_of(places: Tensor, patch: int, x: Tensor) -> Tensor:
    """places: (B, K) places of patches, x: (B, C, H, W) -> (B, 1, H, W), 1 within these patches and 0 elsewhere."""
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    seen = torch.zeros(len(places), rows * columns).scatter(1, places, 1.0).unflatten(1, (1, rows, columns))
    return seen.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(x, non_blocking=True)
