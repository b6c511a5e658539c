"""Heun's method in sigma / alpha (EDM, https://arxiv.org/abs/2206.00364, algorithm 1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class Heun:
    """Second order; calls the network twice a step."""

    order: ClassVar[int] = 2
    steps: int = 20
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W) unit normal -> x: (B, C, H, W)."""
        times = self.times(schedule).to(noise.device)
        return self.walk(denoise, schedule, schedule(times[0])[1].to(noise) * noise, times, seeds)

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        for t, s in pairwise(times.to(x)):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            h = sigma_s / alpha_s - sigma_t / alpha_t
            slope_t = (x - alpha_t * denoise(x, t)) / sigma_t
            y = alpha_s * (x / alpha_t + h * slope_t)
            slope_s = (y - alpha_s * denoise(y, s)) / sigma_s
            x = alpha_s * (x / alpha_t + h * (slope_t + slope_s) / 2)
        return x

    def times(self, schedule: Schedule) -> Tensor:
        """-> (steps + 1), float64."""
        return self.grid(self.steps, schedule)
