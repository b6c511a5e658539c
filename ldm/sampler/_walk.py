"""What all samplers share: a walk along the times of a grid, from noise."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.types import Denoise, Schedule


@runtime_checkable
class Sized(Protocol):
    """A grid whose times depend on how large a picture is."""

    def sized(self, height: int, width: int) -> Callable[[int, Schedule], Tensor]:
        """The grid for latents of height x width."""


class Walk:
    """A sampler, given its `walk` and the settings `steps` and `grid`: walks the grid's times, from noise at the first."""

    steps: int
    grid: Callable[[int, Schedule], Tensor]
    walk: Callable[[Denoise, Schedule, Tensor, Tensor, Sequence[int]], Tensor]

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W) unit normal -> x: (B, C, H, W)."""
        times = self.times(schedule, noise.shape[2:])
        return self.walk(denoise, schedule, start(schedule, times, noise), times, seeds)

    def times(self, schedule: Schedule, sides: Sequence[int] | None = None) -> Tensor:
        """-> (steps + 1), from the first time down to the last, float64. sides: the latents' height and width."""
        grid = self.grid.sized(*sides) if sides is not None and isinstance(self.grid, Sized) else self.grid
        return grid(self.steps, schedule)


def start(schedule: Schedule, times: Tensor, noise: Tensor) -> Tensor:
    """noise: (B, C, H, W) unit normal -> x at times[0], of the variance that x_t of whitened latents has."""
    alpha, sigma = schedule(times[0])
    return torch.hypot(alpha, sigma) * noise
