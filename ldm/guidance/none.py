"""No guidance: x_hat = D(x_t, t, condition)."""

from dataclasses import dataclass

from torch import Tensor

from ldm.guidance.cfg import refuse_negative
from ldm.types import Batch, Conditioned, Denoise


@dataclass(frozen=True)
class Unguided:
    """The model's estimate as it is, at one call of the network."""

    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """ask: the request's fields, B of each -> the estimate, (x_t, t) -> x_hat.

        Raises:
            Refusal: the request has a negative.
        """
        refuse_negative(ask, "none")
        cond = model.condition(ask)

        def denoise(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            return model.denoiser(x_t, t, cond, *to)

        return denoise
