"""Heun's method along the schedule's path, with churn (EDM, https://arxiv.org/abs/2206.00364, algorithms 1 and 2).

dx = x_hat dalpha + noise_hat dsigma,  noise_hat = (x_t - alpha_t x_hat) / sigma_t
y = x_t + (alpha_s - alpha_t) x_hat + (sigma_s - sigma_t) noise_hat, and x_s the same with the means of both over t and, at y, s

On the Karras schedule these are EDM's steps in sigma, on the linear one those of flow matching in t.
"""

import math
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
class Heun(Walk):
    """Second order. It calls the network twice a step, and once in the step into t = 0.

    Args:
        steps: of the grid.
        churn: EDM's S_churn, at least 0: a step first raises sigma / alpha by the share churn / steps, at most sqrt(2) - 1, with
            fresh noise; 0 is deterministic.
        low, high: EDM's S_tmin and S_tmax: there is churn where low <= sigma / alpha <= high.
        std: EDM's S_noise, the fresh noise's standard deviation.
        grid: (steps, schedule) -> times.

    Raises:
        Refusal: a negative churn.
    """

    order: ClassVar[int] = 2
    steps: int = 20
    churn: float = 0.0
    low: float = 0.0
    high: float = math.inf
    std: float = 1.0
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __post_init__(self) -> None:
        if self.churn < 0:
            raise Refusal(f"sampler.churn={self.churn}: at least 0 is wanted, which adds no fresh noise.")

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        draw = Streams(seeds)
        raised = 1 + min(self.churn / self.steps, math.sqrt(2) - 1)
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            if self.churn and self.low <= sigma_t / alpha_t <= self.high:
                t = schedule.inverse((raised * sigma_t / alpha_t).log())
                (alpha_0, sigma_0), (alpha_t, sigma_t) = (alpha_t, sigma_t), schedule(t)
                added = ((sigma_t / alpha_t) ** 2 - (sigma_0 / alpha_0) ** 2).clamp(min=0).sqrt()
                x = alpha_t / alpha_0 * x + alpha_t * self.std * added * draw(x)
            x_hat = denoise(x, t)
            noise_hat = (x - alpha_t * x_hat) / sigma_t
            y = alpha_s * x_hat + sigma_s * noise_hat
            if s > 0:
                ahead = denoise(y, s)
                x_hat = (x_hat + ahead) / 2
                noise_hat = (noise_hat + (y - alpha_s * ahead) / sigma_s) / 2
                y = x + (alpha_s - alpha_t) * x_hat + (sigma_s - sigma_t) * noise_hat
            x = y
        return x
