"""Ancestral sampling (DDPM, https://arxiv.org/abs/2006.11239, algorithm 2 and equation 7), for any schedule and any steps.

x_s = (alpha_t / alpha_s) (sigma_s / sigma_t)^2 x_t + alpha_s (forward / sigma_t^2) x_hat + std noise
forward = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2,  std^2 = forward (sigma_s / sigma_t)^(2 (1 - v))
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
class DDPM(Walk):
    """First order, stochastic. It calls the network once a step.

    `v` chooses the variance of a step, on a logarithmic scale, between DDPM's lower bound, at 0, and its upper bound, at 1
    (improved DDPM, https://arxiv.org/abs/2102.09672, equation 15). The step into t = 0 adds no noise.

    Raises:
        Refusal: a v outside [0, 1].
    """

    order: ClassVar[int] = 1
    steps: int = 250
    v: float = 0.0
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __post_init__(self) -> None:
        if not 0 <= self.v <= 1:
            raise Refusal(f"sampler.v={self.v}: it is between 0, the lower bound of the variance, and 1, the upper bound.")

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along falling times: (steps + 1)."""
        draw = Streams(seeds)
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            forward = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
            ratio = (sigma_s / sigma_t) ** 2
            x = alpha_t / alpha_s * ratio * x + alpha_s * forward / sigma_t**2 * denoise(x, t)
            if s > 0:
                x = x + (forward * ratio ** (1 - self.v)).sqrt() * draw(x)
        return x
