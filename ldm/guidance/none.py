"""No guidance: the condition, as it is."""

from dataclasses import dataclass

from torch import Tensor

from ldm.guidance.cfg import refuse_negative
from ldm.types import Batch, Conditioned, Denoise


@dataclass(frozen=True)
class Unguided:
    """One call of the network a step.

    Raises:
        ValueError: the request has a negative.
    """

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields -> Denoise."""
        refuse_negative(ask, "none")
        cond = model.condition(ask)

        def denoise(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            return model.denoiser(x_t, t, cond, *to)

        return denoise
