"""A scale for each condition (InstructPix2Pix, https://arxiv.org/abs/2211.09800, equation 3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.types import Batch, Cond, Conditioned, Denoise


@dataclass(frozen=True)
class Scales:
    """x_0 + s_1 (x_1 - x_0) + s_2 (x_2 - x_1) + ..., where x_i is told the first i conditions of `scales`.

    Conditions that `scales` does not name are always told; those that x_i is not told yet have their negative request in their
    place where there is one. With one scale for all it is classifier-free guidance, and with 1 for all no guidance (one call of
    the network); otherwise there is one call more than conditions, as one batch.

    Raises:
        Refusal: no condition is named.
    """

    scales: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.scales:
            raise Refusal("guidance.scales={}: name the model's conditions, as guidance.scales={text: 7.5, map: 1.5}.")

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields -> Denoise."""
        if all(scale == 1 for scale in self.scales.values()):
            cond = model.condition(ask)
            return lambda x_t, t, *to: model.denoiser(x_t, t, cond, *to)
        named, others = list(self.scales), [n for n in model.conditioner.embedders if n not in self.scales]
        conds = [model.condition(ask, only=[*others, *named[:i]]) for i in range(len(named) + 1)]
        stacked, count = reduce(Cond.stack, conds), len(conds)

        def denoise(x_t: Tensor, *times: Tensor) -> Tensor:
            t, *to = (s.expand(len(x_t)).repeat(count) for s in times)
            x_hat = model.denoiser(torch.cat([x_t] * count), t, stacked, *to).chunk(count)
            return x_hat[0] + sum(s * (x_hat[i + 1] - x_hat[i]) for i, s in enumerate(self.scales.values()))

        return denoise
