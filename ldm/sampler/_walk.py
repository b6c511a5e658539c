"""What all samplers share: they start from noise, and walk along the times of a grid.

x at times[0] = sqrt(alpha^2 + sigma^2) noise, which is the variance of x_t for whitened latents
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.types import Denoise, Schedule


@runtime_checkable
class Sized(Protocol):
    """A grid whose times depend on the size of the latents."""

    def sized(self, height: int, width: int) -> Callable[[int, Schedule], Tensor]:
        """-> the grid for latents of height x width."""


class Walk:
    """A sampler, for those that have a `walk` and the settings `steps` and `grid`: it walks along the grid's times, from noise.

    `grid` is (steps, schedule) -> times, (steps + 1), falling, float64.
    """

    steps: int
    grid: Callable[[int, Schedule], Tensor]
    walk: Callable[[Denoise, Schedule, Tensor, Tensor, Sequence[int]], Tensor]

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W), unit normal; seeds: one a picture -> x: (B, C, H, W)."""
        times = self.times(schedule, noise.shape[2:])
        return self.walk(denoise, schedule, start(schedule, times, noise), times, seeds)

    def times(self, schedule: Schedule, sides: Sequence[int] | None = None) -> Tensor:
        """-> (steps + 1), from the first time down to the last, float64; `sides` are the latents' height and width."""
        grid = self.grid.sized(*sides) if sides is not None and isinstance(self.grid, Sized) else self.grid
        return grid(self.steps, schedule)


def start(schedule: Schedule, times: Tensor, noise: Tensor) -> Tensor:
    """noise: (B, C, H, W), unit normal -> x at times[0], (B, C, H, W)."""
    alpha, sigma = schedule(times[0])
    return torch.hypot(alpha, sigma) * noise
