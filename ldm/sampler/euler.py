"""Euler's method in sigma / alpha (EDM, https://arxiv.org/abs/2206.00364, algorithm 1 without its correction).

d(x / alpha) / d(sigma / alpha) = noise_hat = (x_t - alpha_t x_hat) / sigma_t, the probability-flow ODE
x_s / alpha_s = x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) noise_hat, the same steps as deterministic DDIM's
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ldm.sampler._walk import Walk
from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class Euler(Walk):
    """First order. It calls the network once a step."""

    order: ClassVar[int] = 1
    steps: int = 50
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            x_hat = denoise(x, t)
            slope = (x - alpha_t * x_hat) / sigma_t
            x = alpha_s * x_hat + sigma_s * slope  # = alpha_s (x / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) slope)
        return x
