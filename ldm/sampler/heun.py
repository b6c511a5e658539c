"""Heun's method in sigma / alpha, with churn (EDM, https://arxiv.org/abs/2206.00364, algorithm 2; without it, algorithm 1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ldm.sampler.grid import UNIFORM, start
from ldm.sampler.noise import Streams
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class Heun:
    """Second order; calls the network twice a step, once in the step into t = 0.

    Where low <= sigma / alpha <= high, a step first raises sigma / alpha by churn / steps (at most 41 %) with fresh noise of
    `std`: EDM's S_churn, S_tmin, S_tmax and S_noise. churn = 0 is deterministic.
    """

    order: ClassVar[int] = 2
    steps: int = 20
    churn: float = 0.0
    low: float = 0.0
    high: float = math.inf
    std: float = 1.0
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W) unit normal -> x: (B, C, H, W)."""
        times = self.times(schedule)
        return self.walk(denoise, schedule, start(schedule, times, noise), times, seeds)

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        draw = Streams(seeds)
        raised = 1 + min(self.churn / (len(times) - 1), math.sqrt(2) - 1)
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            if self.churn and self.low <= sigma_t / alpha_t <= self.high:
                t = schedule.inverse((raised * sigma_t / alpha_t).log())
                (alpha_0, sigma_0), (alpha_t, sigma_t) = (alpha_t, sigma_t), schedule(t)
                added = ((sigma_t / alpha_t) ** 2 - (sigma_0 / alpha_0) ** 2).clamp(min=0).sqrt()
                x = alpha_t * (x / alpha_0 + self.std * added * draw(x))
            h = sigma_s / alpha_s - sigma_t / alpha_t
            slope = (x - alpha_t * denoise(x, t)) / sigma_t
            y = alpha_s * (x / alpha_t + h * slope)
            if s > 0:
                slope = (slope + (y - alpha_s * denoise(y, s)) / sigma_s) / 2
                y = alpha_s * (x / alpha_t + h * slope)
            x = y
        return x

    def times(self, schedule: Schedule) -> Tensor:
        """-> (steps + 1), float64."""
        return self.grid(self.steps, schedule)
