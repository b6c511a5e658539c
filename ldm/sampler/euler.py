"""Euler's method in sigma / alpha (EDM, https://arxiv.org/abs/2206.00364, algorithm 1 without its correction).

The same steps as deterministic DDIM's, told as the probability-flow ODE: d(x / alpha) / d(sigma / alpha) = noise_hat.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ldm.sampler.grid import UNIFORM, start
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class Euler:
    """First order; calls the network once a step."""

    order: ClassVar[int] = 1
    steps: int = 50
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W) unit normal -> x: (B, C, H, W)."""
        times = self.times(schedule)
        return self.walk(denoise, schedule, start(schedule, times, noise), times, seeds)

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            x_hat = denoise(x, t)
            slope = (x - alpha_t * x_hat) / sigma_t
            x = alpha_s * x_hat + sigma_s * slope  # = alpha_s (x / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) slope)
        return x

    def times(self, schedule: Schedule) -> Tensor:
        """-> (steps + 1), float64."""
        return self.grid(self.steps, schedule)
