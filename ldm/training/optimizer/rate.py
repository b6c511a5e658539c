"""Learning rates over a run: step -> factor of the optimizer's rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """A linear warm-up, then constant."""

    warmup: int = 0

    def __call__(self, step: int) -> float:
        """step, from 0 -> factor in (0, 1]."""
        return min(1.0, (step + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class Cosine:
    """A linear warm-up, then half a cosine down to `floor` at `steps` (https://arxiv.org/abs/1608.03983, equation 5)."""

    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """step, from 0 -> factor in [floor, 1]."""
        done = min(max(step - self.warmup, 0) / max(self.steps - self.warmup, 1), 1.0)
        return min(1.0, (step + 1) / (self.warmup + 1)) * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Linear:
    """A linear warm-up, then a straight line down to `floor` at `steps`."""

    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """step, from 0 -> factor in [floor, 1]."""
        done = min(max(step - self.warmup, 0) / max(self.steps - self.warmup, 1), 1.0)
        return min(1.0, (step + 1) / (self.warmup + 1)) * (1 - (1 - self.floor) * done)


@dataclass(frozen=True)
class InverseSqrt:
    """A linear warm-up, constant up to `hold`, then sqrt(hold / step) (EDM2, https://arxiv.org/abs/2312.02696, equation 67)."""

    hold: int
    warmup: int = 0

    def __call__(self, step: int) -> float:
        """step, from 0 -> factor in (0, 1]."""
        return min(1.0, (step + 1) / (self.warmup + 1)) / math.sqrt(max(step / self.hold, 1.0))
