"""Classifier-free guidance (https://arxiv.org/abs/2207.12598, equation 6 with scale = 1 + w)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.types import Batch, Denoise, Told


@dataclass(frozen=True)
class CFG:
    """scale = 0 ignores the condition, 1 follows it (one call of the network), more than 1 exaggerates it.

    A request's field `negative.<key>` takes the place of `<key>` in the null condition.
    """

    scale: float = 2.0

    def __call__(self, model: Told, ask: Batch) -> Denoise:
        """ask: the request's fields -> Denoise."""
        negative = {k.removeprefix("negative."): v for k, v in ask.items() if k.startswith("negative.")}
        cond = model.tell(ask)
        if self.scale == 1:
            return lambda x_t, t: model.denoiser(x_t, t, cond)
        null = model.tell({**ask, **negative}) if negative else model.tell(ask, only=())
        both = cond.stack(null)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x_cond, x_null = model.denoiser(torch.cat((x_t, x_t)), t.expand(len(x_t)).repeat(2), both).chunk(2)
            return x_null + self.scale * (x_cond - x_null)

        return denoise
