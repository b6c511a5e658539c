"""Euler's method to a lower noise level than the next, then fresh noise up to the next (k-diffusion's `euler_ancestral`).

x_s / alpha_s = x_hat + down noise_hat + up noise,  r = sigma / alpha
up = min(r_s, eta r_s sqrt(1 - (r_s / r_t)^2)),  down = sqrt(r_s^2 - up^2)
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
class EulerAncestral(Walk):
    """First order, stochastic. It calls the network once a step.

    `eta` = 1 has DDPM's variance (https://arxiv.org/abs/2006.11239, equation 7); `eta` = 0 is Euler's method.

    Raises:
        Refusal: a negative eta.
    """

    order: ClassVar[int] = 1
    steps: int = 50
    eta: float = 1.0
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise Refusal(f"sampler.eta={self.eta}: at least 0 is wanted, which adds no fresh noise.")

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along falling times: (steps + 1)."""
        draw = Streams(seeds)
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            ratio_t, ratio_s = sigma_t / alpha_t, sigma_s / alpha_s
            up = (self.eta * ratio_s * (1 - (ratio_s / ratio_t) ** 2).sqrt()).clamp(max=ratio_s)
            down = (ratio_s**2 - up**2).sqrt()
            x_hat = denoise(x, t)
            slope = (x - alpha_t * x_hat) / sigma_t
            x = alpha_s * (x_hat + down * slope + up * draw(x))
        return x
