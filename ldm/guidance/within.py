"""A ControlNet that works in an interval of noise levels, and has strength 0 outside."""

from dataclasses import dataclass, field
from math import inf

import torch

from ldm.errors import Refusal
from ldm.guidance.cfg import CFG
from ldm.guidance.interval import between
from ldm.types import Batch, Conditioned, Denoise, Guidance


@dataclass(frozen=True)
class Within:
    """The guidance `inner`, in which the condition called `condition` has strength 0 unless low < sigma / alpha <= high."""

    condition: str
    low: float = 0.0
    high: float = inf
    inner: Guidance = field(default_factory=CFG)

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields, B of each -> the guided estimate, (x_t, t) -> x_hat.

        Raises:
            Refusal: the model has no such condition, or it has no strength.
        """
        embedders, strength = model.conditioner.embedders, f"{self.condition}_strength"
        strong = [name for name in embedders if f"{name}_strength" in embedders[name].key]
        if self.condition not in strong:
            raise Refusal(f"guidance.condition={self.condition}: conditions of a strength are {strong or 'none'} here.")
        without = self.inner(model, {**ask, strength: torch.zeros(len(ask[self.condition]))})
        return between(self.low, self.high, model.denoiser.schedule, self.inner(model, ask), without)
