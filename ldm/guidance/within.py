"""A ControlNet that speaks in an interval of noise levels: from its start to its end."""

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.guidance.cfg import CFG
from ldm.types import Batch, Conditioned, Denoise, Guidance, like


@dataclass(frozen=True)
class Within:
    """`inner`, where low < sigma / alpha <= high; outside, the condition called `condition` has strength 0.

    Raises:
        Refusal: the model has no such condition, or it has no strength.
    """

    condition: str
    low: float = 0.0
    high: float = inf
    inner: Guidance = field(default_factory=CFG)

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields -> Denoise."""
        embedders, strength = model.conditioner.embedders, f"{self.condition}_strength"
        strong = [name for name in embedders if f"{name}_strength" in embedders[name].key]
        if self.condition not in strong:
            raise Refusal(f"guidance.condition={self.condition}: conditions of a strength are {strong or 'none'} here.")
        speaking = self.inner(model, ask)
        count = len(ask[self.condition])
        silent = self.inner(model, {**ask, strength: torch.zeros(count)})

        def denoise(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            alpha, sigma = model.denoiser.schedule(t)
            inside = (self.low < sigma / alpha) & (sigma / alpha <= self.high)
            if inside.all():
                return speaking(x_t, t, *to)
            if not inside.any():
                return silent(x_t, t, *to)
            return torch.where(like(inside, x_t) > 0, speaking(x_t, t, *to), silent(x_t, t, *to))

        return denoise
