"""A guidance scale for each condition (InstructPix2Pix, https://arxiv.org/abs/2211.09800, equation 3).

x_hat = x_0 + s_1 (x_1 - x_0) + s_2 (x_2 - x_1) + ..., where x_i is the estimate with the first i conditions of `scales`
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.guidance.cfg import say_unheard
from ldm.types import Batch, Cond, Conditioned, Denoise


@dataclass(frozen=True)
class Scales:
    """The formula above; `scales` maps names of conditions to s_1, s_2, ..., in this order.

    Every x_i has the conditions that `scales` does not name. Those that it lacks are dropped, or read their negative where the
    request has one. One scale for all is classifier-free guidance. 1 for all is no guidance, at one call of the network;
    otherwise there is one call more than there are scales, in one batch.

    Raises:
        Refusal: no condition is named.
    """

    scales: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.scales:
            raise Refusal("guidance.scales={}: name the model's conditions, as guidance.scales={text: 7.5, map: 1.5}.")

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields, B of each -> the guided estimate, (x_t, t) -> x_hat."""
        if all(scale == 1 for scale in self.scales.values()):
            say_unheard(ask, "guidance.scales of 1")
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
