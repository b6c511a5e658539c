"""Which times to train on: numbers in [0, 1), stratified over the global batch -> t."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.types import Schedule


@dataclass(frozen=True)
class Uniform:
    """Every time alike."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return u


@dataclass(frozen=True)
class LogitNormal:
    """More of the middle of the times (SD3, https://arxiv.org/abs/2403.03206, equation 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return torch.sigmoid(self.mean + self.std * _normal(u))


@dataclass(frozen=True)
class BySize:
    """Logit-normal, with more noise for larger pictures: on straight paths its mean grows by mu as sigma / alpha grows by
    exp(mu), the shift of SD3's equation 23.

    It is what `sampler.grid=by_size` has for drawing: 0.5 and 1.15 are Flux dev's, 0 and log(3) at 256 and 1024 pixels Stable
    Diffusion 3's.

    Args:
        mean, std: of the normal distribution before the shift.
        low, high: the shift mu at `few` and at `many` patches; between and beyond it is linear in their number.
        few, many: numbers of patches.
        patch: so many latents a side are one patch.
    """

    mean: float = 0.0
    std: float = 1.0
    low: float = 0.5
    high: float = 1.15
    few: int = 256
    many: int = 4096
    patch: int = 2

    def sized(self, height: int, width: int) -> LogitNormal:
        """The times for latents of height x width."""
        count = (height // self.patch) * (width // self.patch)
        return LogitNormal(self.mean + self.low + (self.high - self.low) * (count - self.few) / (self.many - self.few), self.std)

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B), for `many` patches: where nothing says how many there are."""
        return LogitNormal(self.mean + self.high, self.std)(u, schedule)


@runtime_checkable
class Sized(Protocol):
    """Times that depend on how large a picture is."""

    def sized(self, height: int, width: int) -> Callable[[Tensor, Schedule], Tensor]:
        """The times for latents of height x width."""


@dataclass(frozen=True)
class LogNormal:
    """log(sigma / alpha) normal, whatever the schedule (EDM, https://arxiv.org/abs/2206.00364, table 1).

    EDM's data has std 0.5 and ours 1, which adds log(2) to the mean: its (-1.2, 1.2) is (-0.5, 1.2) here, and EDM2's
    (-0.4, 1.0) is (0.3, 1.0). What falls beyond the schedule's ends is trained at its ends.
    """

    mean: float = -0.5
    std: float = 1.2

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u: (B) uniform in [0, 1) -> t: (B) in [0, 1]."""
        return schedule.inverse(self.mean + self.std * _normal(u))


def _normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
