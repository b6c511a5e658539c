"""Noise schedules: t in [0, 1] -> (alpha, sigma) of x_t = alpha x + sigma noise, and back from log(sigma / alpha).

Linear        sigma = t,  alpha = 1 - t
Cosine        sigma = sin(pi t / 2),  alpha = cos(pi t / 2)
Karras        sigma^(1 / rho) linear in t,  alpha = 1
ScaledLinear  alpha_n^2 = prod over i <= n of (1 - beta_i),  sqrt(beta) linear in n;  sigma = sqrt(1 - alpha^2)
DDPM          the same, beta linear in n

Floors keep alpha and sigma above zero, so that no formula elsewhere needs a special case at its ends.

Tables of N steps are continued between the steps: step n is t = (n + 1) / N, and log(sigma / alpha) is linear in t from one step
to the next; below the first it falls to log(floor) at t = 0.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.errors import Refusal

# alpha^2 at t = 1 of zero terminal SNR, at most: the smallest positive float16, so that sigma / alpha is finite.
TERMINAL_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class Linear:
    """Straight paths from data to noise (rectified flow, https://arxiv.org/abs/2209.03003).

    `shift` > 0 multiplies sigma / alpha everywhere: sqrt(m / n) for pictures of m pixels where 1 is right for n (SD3,
    https://arxiv.org/abs/2403.03206, equation 23). `floor` is sigma at t = 0, and alpha at t = 1, before the shift.
    """

    floor: float = 1e-3
    shift: float = 1.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*), alpha + sigma = 1."""
        sigma = self.floor + (1 - 2 * self.floor) * t
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return 1 - sigma, sigma

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        return ((torch.sigmoid(log_ratio - math.log(self.shift)) - self.floor) / (1 - 2 * self.floor)).clamp(0, 1)


def by_dimension(numbers: int, base: int = 4096) -> Linear:
    """Straight paths with shift = sqrt(numbers / base), for latents of so many numbers (https://arxiv.org/abs/2510.11690, section
    4.2): the more there are that tell the same, the more noise hides it. `base` is the count for which 1 is right.

    Raises:
        Refusal: one of them is below 1.
    """
    if min(numbers, base) < 1:
        raise Refusal(f"schedule.numbers={numbers} schedule.base={base}: counts of the latents' numbers, above 0, were wanted.")
    return Linear(shift=math.sqrt(numbers / base))


@dataclass(frozen=True)
class Cosine:
    """Variance preserving, alpha^2 + sigma^2 = 1 (https://arxiv.org/abs/2102.09672, equation 17 without its offset).

    `shift` > 0 multiplies sigma / alpha everywhere: d / 64 for pictures of side d (simple diffusion,
    https://arxiv.org/abs/2301.11093, section 3.1). `floor` is the share of the quarter circle that is left out at either end.
    """

    floor: float = 1e-3
    shift: float = 1.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*), alpha^2 + sigma^2 = 1."""
        angle = (self.floor + (1 - 2 * self.floor) * t) * math.pi / 2
        angle = torch.atan2(self.shift * torch.sin(angle), torch.cos(angle))
        return torch.cos(angle), torch.sin(angle)

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        angle = torch.atan((log_ratio - math.log(self.shift)).exp())
        return ((angle * 2 / math.pi - self.floor) / (1 - 2 * self.floor)).clamp(0, 1)


@dataclass(frozen=True)
class Karras:
    """Variance exploding, sigma^(1/rho) linear in t (EDM, https://arxiv.org/abs/2206.00364, equation 5).

    `sigma_min` is sigma at t = 0, `sigma_max` at t = 1, for data of unit variance; a larger `rho` takes shorter steps near the
    data.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*) of ones, sigma: (*)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + (high - low) * t) ** self.rho

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (((log_ratio / self.rho).exp() - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class ScaledLinear:
    """Stable Diffusion's table: sqrt(beta) linear over the steps (CompVis/stable-diffusion, `make_beta_schedule("linear")`).

    Args:
        beta_start, beta_end: betas of the first and the last step, in (0, 1).
        steps: of the table, N.
        floor: sigma / alpha at t = 0.
        zero_terminal_snr: whether it is rescaled so that no signal is left at t = 1 (https://arxiv.org/abs/2305.08891,
            algorithm 1; alpha^2 is at most 2^-24 there).
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    floor: float = 1e-5
    zero_terminal_snr: bool = False
    table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64) ** 2
        object.__setattr__(self, "table", _table(betas, self.floor, self.zero_terminal_snr))

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*), alpha^2 + sigma^2 = 1."""
        return _read(self.table.to(t.device, non_blocking=True), t)

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        return _find(self.table.to(log_ratio.device, non_blocking=True), log_ratio)


@dataclass(frozen=True)
class DDPM:
    """DDPM's table: beta linear over the steps (https://arxiv.org/abs/2006.11239, section 4); DiT's and ADM's too.

    Args:
        beta_start, beta_end: betas of the first and the last step, in (0, 1).
        steps: of the table, N.
        floor: sigma / alpha at t = 0.
        zero_terminal_snr: as in `ScaledLinear`.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    floor: float = 1e-5
    zero_terminal_snr: bool = False
    table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        object.__setattr__(self, "table", _table(betas, self.floor, self.zero_terminal_snr))

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*), alpha^2 + sigma^2 = 1."""
        return _read(self.table.to(t.device, non_blocking=True), t)

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*)."""
        return _find(self.table.to(log_ratio.device, non_blocking=True), log_ratio)


def _table(betas: Tensor, floor: float, zero_terminal_snr: bool) -> Tensor:
    """betas: (N) float64 -> log(sigma / alpha) at t = 0, 1 / N, ..., 1: (N + 1)."""
    alpha = torch.cumprod(1 - betas, dim=0).sqrt()
    if zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        alpha[-1] = min(TERMINAL_ALPHA_BAR**0.5, alpha[-2].item() / 2)
    start = torch.tensor([math.log(floor)], dtype=torch.float64)
    return torch.cat((start, (1 / alpha**2 - 1).log() / 2))


def _read(table: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """table: (N + 1), t: (*) in [0, 1] -> alpha: (*), sigma: (*)."""
    steps = len(table) - 1
    place = t.double().clamp(0, 1) * steps
    low = place.floor().long().clamp(max=steps - 1)
    log_ratio = torch.lerp(table[low], table[low + 1], place - low)
    return torch.sigmoid(-2 * log_ratio).sqrt().to(t), torch.sigmoid(2 * log_ratio).sqrt().to(t)


def _find(table: Tensor, log_ratio: Tensor) -> Tensor:
    """table: (N + 1), rising, log(sigma / alpha): (*) -> t: (*) in [0, 1], the inverse of `_read`."""
    steps, ratio = len(table) - 1, log_ratio.double().contiguous()
    low = (torch.searchsorted(table, ratio) - 1).clamp(0, steps - 1)
    place = low + (ratio - table[low]) / (table[low + 1] - table[low])
    return (place / steps).clamp(0, 1).to(log_ratio)
