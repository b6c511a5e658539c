"""Guidance in an interval of noise levels (https://arxiv.org/abs/2404.07724, equation 5)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.types import Batch, Conditioned, Denoise, Guidance, Schedule, like


@dataclass(frozen=True)
class Interval:
    """The guidance `inner` where low < sigma / alpha <= high, and none outside, which takes one call of the network.

    The paper's sigma is that of data with std 0.5, so that its (0.28, 2.9] is (0.56, 5.8] here.
    """

    low: float = 0.56
    high: float = 5.8
    inner: Guidance = field(default_factory=CFG)

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields, B of each -> the guided estimate, (x_t, t) -> x_hat."""
        positive = {field: value for field, value in ask.items() if not field.startswith("negative.")}
        return between(self.low, self.high, model.denoiser.schedule, self.inner(model, ask), Unguided()(model, positive))


def between(low: float, high: float, schedule: Schedule, inside: Denoise, outside: Denoise) -> Denoise:
    """-> an estimate that is one of two, by the noise level of each picture.

    Args:
        low, high: the bounds of sigma / alpha, the first exclusive.
        schedule: t -> (alpha, sigma).
        inside: the estimate where low < sigma / alpha <= high.
        outside: the estimate elsewhere.
    """

    def denoise(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        within = (low < sigma / alpha) & (sigma / alpha <= high)
        if within.all():
            return inside(x_t, t, *to)
        if not within.any():
            return outside(x_t, t, *to)
        return torch.where(like(within, x_t) > 0, inside(x_t, t, *to), outside(x_t, t, *to))

    return denoise
