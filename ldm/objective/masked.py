"""Masked training: the network sees some of the patches, and answers for those (https://arxiv.org/abs/2306.09305, section 3.2).

    E weight(t) mean over seen patches of distance(output - target)

Without the paper's second network, which guesses what was not seen.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.nn.route import Route
from ldm.objective.regression import LOGIT_NORMAL, NORMAL, PLAIN, SQUARE, Regression
from ldm.objective.route import blocks_of, check_rate, kept_of, routed
from ldm.types import Batch, Cond, Draw, InTraining, Schedule, like


class Masked(nn.Module):
    """Regression on the patches that go through the blocks; the others go through none. The parts are as in regression.

    Args:
        rate: the share of the patches that are left out, in [0, 1); 0 is regression.
        until: the step from which on all are seen, as the network will see them when it draws; None: never.

    Raises:
        Refusal: a share outside [0, 1), or a backbone whose blocks take no fewer patches, or that joins some (`fuse`).
    """

    def __init__(
        self,
        rate: float = 0.5,
        until: int | None = None,
        time: Callable[[Tensor, Schedule], Tensor] = LOGIT_NORMAL,
        weight: Callable[[Tensor, Tensor, Tensor], Tensor] = PLAIN,
        noise: Callable[[Draw, Tensor], Tensor] = NORMAL,
        distance: Callable[[Tensor], Tensor] = SQUARE,
    ) -> None:
        super().__init__()
        check_rate(rate)
        self.regression, self.rate, self.until = Regression(time, weight, noise, distance), rate, until

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": ()}."""
        denoiser, part = model.denoiser, self.regression
        first, last = blocks_of(denoiser.backbone, 1, -1)
        if not self.training or not self.rate or (self.until is not None and draw.step >= self.until):
            return part(model, batch, x, cond, draw)
        kept = kept_of(denoiser.backbone, x, draw, self.rate)
        t = part.time_for(x)(draw.stratified("time"), denoiser.schedule).to(x, non_blocking=True)
        noise = part.noise(draw, x)
        alpha, sigma = (like(s, x) for s in denoiser.schedule(t))
        with routed(denoiser.backbone, Route(first, last, kept)):
            output = denoiser.output(alpha * x + sigma * noise, t, cond)
        seen = seen_of(kept, denoiser.backbone.patch, x)
        error = seen * (output - denoiser.prediction.target(x, noise, alpha, sigma))
        return {"loss": part.error(denoiser, error, t).mean() / seen[:1].mean()}


def seen_of(kept: Tensor, patch: int, x: Tensor) -> Tensor:
    """kept: (B, K) places of patches, x: (B, C, H, W) -> (B, 1, H, W), 1 within these patches and 0 elsewhere."""
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    seen = torch.zeros(len(kept), rows * columns).scatter(1, kept, 1.0).unflatten(1, (1, rows, columns))
    return seen.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(x, non_blocking=True)
