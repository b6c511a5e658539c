"""DDIM (https://arxiv.org/abs/2010.02502, equations 12 and 16).

x_s = alpha_s x_hat + sqrt(sigma_s^2 - added^2) noise_hat + added noise,  noise_hat = (x_t - alpha_t x_hat) / sigma_t
added = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ldm.errors import Refusal
from ldm.sampler._noise import Streams
from ldm.sampler._walk import Walk
from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class DDIM(Walk):
    """First order. It calls the network once a step.

    `eta` = 0 is deterministic, and inverted by walking along the same times upwards; `eta` = 1 is DDPM's ancestral sampling.

    Raises:
        Refusal: an eta outside [0, 1].
    """

    order: ClassVar[int] = 1
    steps: int = 50
    eta: float = 0.0
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise Refusal(f"sampler.eta={self.eta}: it is between 0, no fresh noise, and 1, DDPM's.")

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        draw = Streams(seeds)
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            x_hat = denoise(x, t)
            noise_hat = (x - alpha_t * x_hat) / sigma_t
            if self.eta == 0:
                x = alpha_s * x_hat + sigma_s * noise_hat
                continue
            # equation 16, whose ratio of signals is 1 - beta
            added = self.eta * sigma_s * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2).clamp(min=0).sqrt()
            x = alpha_s * x_hat + (sigma_s**2 - added**2).sqrt() * noise_hat + added * draw(x)
        return x
