"""Classifier-free guidance (https://arxiv.org/abs/2207.12598, equation 6 with scale = 1 + w).

x_hat = x_null + scale (x_cond - x_null), whose std over each picture `rescale` brings back to x_cond's:
x_hat (1 + rescale (std(x_cond) / std(x_hat) - 1))  (https://arxiv.org/abs/2305.08891, equations 15 and 16)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.process import warn
from ldm.types import Batch, Conditioned, Denoise, like


@dataclass(frozen=True)
class CFG:
    """`scale` = 0 ignores the condition, 1 follows it, with one call of the network, and more exaggerates it, with two in one
    batch.

    A request's field `negative.<field>` takes the place of `<field>` in the null condition; conditions without one are dropped
    there, and one that is not heard is warned of. `rescale`, in [0, 1], works against over-exposure at large scales.
    """

    scale: float = 2.0
    rescale: float = 0.0

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields, B of each -> the guided estimate, (x_t, t) -> x_hat."""
        cond = model.condition(ask)
        if self.scale == 1:
            say_unheard(ask, "guidance.scale=1")
            return lambda x_t, t, *to: model.denoiser(x_t, t, cond, *to)
        both = cond.stack(model.condition(ask, only=()))

        def denoise(x_t: Tensor, *times: Tensor) -> Tensor:
            t, *to = (s.expand(len(x_t)).repeat(2) for s in times)
            x_cond, x_null = model.denoiser(torch.cat((x_t, x_t)), t, both, *to).chunk(2)
            return rescaled(x_null + self.scale * (x_cond - x_null), x_cond, self.rescale)

        return denoise


def refuse_negative(ask: Batch, guidance: str) -> None:
    """Refuses a negative request for a `guidance` that has no null condition to put it in."""
    if negative := [field for field in ask if field.startswith("negative.")]:
        raise Refusal(
            f"guidance={guidance} takes no negative request, and found {negative}: take negative=... out, or use guidance=cfg, "
            "scales or interval."
        )


def say_unheard(ask: Batch, setting: str) -> None:
    """Warns of a negative request that changes nothing, since a guidance needs no null condition at this setting."""
    if any(field.startswith("negative.") for field in ask):
        warn(f"The negative request changes nothing at {setting}, which asks for no null condition.")


def rescaled(x_hat: Tensor, x_cond: Tensor, rescale: float) -> Tensor:
    """x_hat, x_cond: (B, C, H, W) -> x_hat, its std over each picture brought towards x_cond's by the share `rescale`."""
    if rescale == 0:
        return x_hat
    ratio = x_cond.flatten(1).std(1) / x_hat.flatten(1).std(1)
    return x_hat * like(1 + rescale * (ratio - 1), x_hat)
