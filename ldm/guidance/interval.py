"""Guidance in an interval of noise levels (https://arxiv.org/abs/2404.07724, equation 5)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.types import Batch, Conditioned, Denoise, Guidance, like


@dataclass(frozen=True)
class Interval:
    """`inner` where low < sigma / alpha <= high, and no guidance outside, at one call of the network.

    The paper's sigma is of data with std 0.5, so that its (0.28, 2.9] is (0.56, 5.8] here.
    """

    low: float = 0.56
    high: float = 5.8
    inner: Guidance = field(default_factory=CFG)

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields -> Denoise."""
        positive = {field: value for field, value in ask.items() if not field.startswith("negative.")}
        guided, plain = self.inner(model, ask), Unguided()(model, positive)

        def denoise(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            alpha, sigma = model.denoiser.schedule(t)
            inside = (self.low < sigma / alpha) & (sigma / alpha <= self.high)
            if inside.all():
                return guided(x_t, t, *to)
            if not inside.any():
                return plain(x_t, t, *to)
            return torch.where(like(inside, x_t) > 0, guided(x_t, t, *to), plain(x_t, t, *to))

        return denoise
