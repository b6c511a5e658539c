"""Guiding a model with a bad version of itself (https://arxiv.org/abs/2406.02507, equation 3).

x_hat = x_weak + scale (x_strong - x_weak)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.guidance.cfg import refuse_negative
from ldm.types import Batch, Conditioned, Denoise


@dataclass(frozen=True)
class Autoguidance:
    """The formula above, with the same condition for both networks: quality without loss of variety.

    `weak` loads a smaller or less trained model of the same latents, such as an earlier checkpoint, when it is first needed.
    `scale` = 1 needs no weak model, and one call of the network; any other needs one call of each.
    """

    weak: Callable[[], Conditioned]
    scale: float = 2.0

    @cached_property
    def loaded(self) -> Any:
        """The weak model, loaded once."""
        return self.weak()

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields, B of each -> the guided estimate, (x_t, t) -> x_hat.

        Raises:
            Refusal: the two models have different schedules, or the request has a negative.
        """
        refuse_negative(ask, "autoguidance")
        cond = model.condition(ask)
        if self.scale == 1:
            return lambda x_t, t, *to: model.denoiser(x_t, t, cond, *to)
        weak = self.loaded.to(next(model.denoiser.parameters()).device)
        if weak.denoiser.schedule != model.denoiser.schedule:
            raise Refusal(
                f"The weak model's schedule is {weak.denoiser.schedule} and the model's {model.denoiser.schedule}; "
                "autoguidance needs two of one schedule (guidance.weak.path)."
            )
        cond_weak = weak.condition(ask)

        def denoise(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            x_strong, x_weak = model.denoiser(x_t, t, cond, *to), weak.denoiser(x_t, t, cond_weak, *to)
            return x_weak + self.scale * (x_strong - x_weak)

        return denoise
