"""Grids: the times that a sampler visits, from the first (noise) down to the last (data), at all but which it calls the network.

Each is (steps, schedule) -> times, (steps + 1), float64, in [0, 1]; with i = 0 ... steps:

Uniform    t_i = 1 - i / steps, shifted: s t / (1 + (s - 1) t)
Quadratic  sqrt(t_i) = 1 - i / steps
Karras     (sigma / alpha)^(1 / rho) linear in i
Leading, Trailing, Linspace: steps of a table of `total`, of which step n is at t = (n + 1) / total
(https://arxiv.org/abs/2305.08891, table 2)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.types import Schedule


@dataclass(frozen=True)
class Uniform:
    """Equal steps in t from `first` to `last`; `shift` > 1 takes more of them at high noise (SD3, https://arxiv.org/abs/2403.03206,
    equation 23).
    """

    first: float = 1.0
    last: float = 0.0
    shift: float = 1.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps)
        t = torch.linspace(self.first, self.last, steps + 1, dtype=torch.float64)
        return shifted(t, self.shift)


@dataclass(frozen=True)
class Shifted:
    """Equal steps in t from 1 to the shifted 1 / total, all shifted (SD3's equation 23), then `last`: diffusers' for SD3.

    The lowest time is shifted twice, as in diffusers' FlowMatchEulerDiscreteScheduler.
    """

    shift: float = 3.0
    total: int = 1000
    last: float = 0.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps, self.total)
        t = torch.linspace(1.0, shifted(torch.tensor(1 / self.total), self.shift).item(), steps, dtype=torch.float64)
        return torch.cat((shifted(t, self.shift), torch.tensor([self.last], dtype=torch.float64)))


@dataclass(frozen=True)
class BySize:
    """Equal steps in t from 1 to 0, shifted by exp(mu), where mu is linear in the number of patches: diffusers' for Flux dev
    (huggingface/diffusers 58eb52c, pipeline_flux.py, calculate_shift).

    Args:
        low, high: mu at `few` and at `many` patches.
        few, many: numbers of patches.
        patch: latents a side of a patch.
    """

    low: float = 0.5
    high: float = 1.15
    few: int = 256
    many: int = 4096
    patch: int = 2

    def sized(self, height: int, width: int) -> Uniform:
        """-> the grid for latents of height x width."""
        count = (height // self.patch) * (width // self.patch)
        return Uniform(shift=math.exp(self.low + (self.high - self.low) * (count - self.few) / (self.many - self.few)))

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64, for `many` patches, where the size is not known."""
        return Uniform(shift=math.exp(self.high))(steps, schedule)


@dataclass(frozen=True)
class Quadratic:
    """Equal steps in sqrt(t) from `first` to `last`: more of them near the data (DDIM, https://arxiv.org/abs/2010.02502,
    appendix D.2).
    """

    first: float = 1.0
    last: float = 0.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps)
        return torch.linspace(self.first**0.5, self.last**0.5, steps + 1, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class Karras:
    """Equal steps in (sigma / alpha)^(1 / rho) from the time `first` to `lowest`, then `last` (EDM, https://arxiv.org/abs/2206.00364,
    equation 5).

    `lowest` = 0.001 is the first step of Stable Diffusion's table, and sigma / alpha = 0.002 for schedule=linear.
    """

    rho: float = 7.0
    first: float = 1.0
    lowest: float = 0.001
    last: float = 0.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps)
        alpha, sigma = schedule(torch.tensor([self.first, self.lowest], dtype=torch.float64))
        high, low = ((sigma / alpha) ** (1 / self.rho)).tolist()
        log_ratio = self.rho * torch.linspace(high, low, steps, dtype=torch.float64).log()
        return torch.cat((schedule.inverse(log_ratio), torch.tensor([self.last], dtype=torch.float64)))


@dataclass(frozen=True)
class Leading:
    """Steps i * (total // steps) + offset of the table: the usual grid of Stable Diffusion 1, 2 and XL.

    diffusers' multistep schedulers leave out `spare` = 1 step at the data; its DDIM stops at `last` = 1 / total where
    `set_alpha_to_one` is false.
    """

    total: int = 1000
    offset: int = 1
    spare: int = 0
    last: float = 0.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps, self.total - self.spare - self.offset)
        n = torch.arange(self.spare, steps + self.spare) * (self.total // (steps + self.spare)) + self.offset
        return _at(n.flip(0), self.total, self.last)


@dataclass(frozen=True)
class Trailing:
    """Equal steps down from the last of the table, rounded; then `last`."""

    total: int = 1000
    last: float = 0.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps, self.total)
        n = self.total - torch.arange(steps, dtype=torch.float64) * self.total / steps
        return _at(n.round() - 1, self.total, self.last)


@dataclass(frozen=True)
class Linspace:
    """Equal steps from the last of the table to the first, rounded, both visited; then `last`.

    diffusers' multistep schedulers leave out `spare` = 1 step at the data.
    """

    total: int = 1000
    spare: int = 0
    last: float = 0.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps, self.total - self.spare)
        n = torch.linspace(0, self.total - 1, steps + self.spare, dtype=torch.float64).round().flip(0)
        return _at(n[:steps], self.total, self.last)


@dataclass(frozen=True)
class Distilled:
    """Evenly chosen ones of the `original` steps that a latent consistency model was distilled over, from the last; then `last`
    (https://arxiv.org/abs/2310.04378, section 4.3; diffusers' LCMScheduler).

    Of a table of `total` these are the steps i * (total // original) - 1, for i = 1 ... original.
    """

    total: int = 1000
    original: int = 50
    last: float = 0.0

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (steps + 1) times, float64."""
        _check(steps, self.original)
        i = self.original - (torch.arange(steps, dtype=torch.float64) * (self.original / steps)).floor()
        return _at(i * (self.total // self.original) - 1, self.total, self.last)


@dataclass(frozen=True)
class Listed:
    """Times of your own, from the first to the last. Their number decides the steps, not the sampler's `steps`.

    Raises:
        Refusal: fewer than two times, times outside [0, 1], or times that do not fall.
    """

    times: Sequence[float]

    def __post_init__(self) -> None:
        t = torch.tensor(list(self.times), dtype=torch.float64)
        if len(t) < 2 or t[0] > 1 or t[-1] < 0 or not (t.diff() < 0).all():
            raise Refusal(f"sampler.grid.times={list(self.times)}: at least two falling times in [0, 1] are wanted.")

    def __call__(self, steps: int, schedule: Schedule) -> Tensor:
        """-> (number of times), float64."""
        return torch.tensor(list(self.times), dtype=torch.float64)


UNIFORM = Uniform()


def shifted(t: Tensor, shift: float) -> Tensor:
    """t: (*) -> shift t / (1 + (shift - 1) t): (*), which multiplies sigma / alpha by `shift` on the linear schedule."""
    return shift * t / (1 + (shift - 1) * t)


def _check(steps: int, most: float = math.inf) -> None:
    if steps < 1:
        raise Refusal(f"sampler.steps={steps}: at least one step is wanted.")
    if steps > most:
        raise Refusal(f"sampler.steps={steps}: this grid has room for {most} (sampler.grid); use sampler/grid=uniform.")


def _at(n: Tensor, total: int, last: float) -> Tensor:
    """Steps n of `total` -> their times (n + 1) / total, then `last`."""
    return torch.cat(((n.double() + 1) / total, torch.tensor([last], dtype=torch.float64)))
