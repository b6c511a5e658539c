"""UniPC, multistep, with data prediction and B(h) = e^-h - 1 (https://arxiv.org/abs/2302.04867, algorithms 5 and 6).

x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) (x_hat + sum_i rho_i (x_hat_i - x_hat) / r_i)
h = lambda_s - lambda_t,  r_i = (lambda_i - lambda_t) / h,  lambda = log(alpha / sigma), i over earlier estimates

The predictor takes earlier estimates alone; the corrector takes the step again with the estimate at s, whose r is 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.sampler._walk import Walk
from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class UniPC(Walk):
    """UniPC-p, of order p + 1. It calls the network once a step, for the predictor and for the corrector of the step before.

    The first p and the last p steps are of lower order.

    Raises:
        Refusal: p < 1.
    """

    steps: int = 20
    p: int = 2
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def __post_init__(self) -> None:
        if self.p < 1:
            raise Refusal(f"sampler.p={self.p}: at least 1 is wanted, of order p + 1.")

    @property
    def order(self) -> int:
        """-> the order of convergence (theorem 3.1)."""
        return self.p + 1

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        scales = list(zip(*schedule(times.double().cpu())))
        past: list[Call] = []  # (log(alpha / sigma), x_hat) of the calls so far, the latest first
        p, x_before = 0, x
        for i, (begin, end) in enumerate(pairwise(scales)):
            x_hat = denoise(x, times[i])
            if past:
                x = _step(x_before, scales[i - 1], begin, past[:p], x_hat)
            past = [(torch.log(begin[0] / begin[1]), x_hat), *past[: self.p - 1]]
            p, x_before = min(self.p, i + 1, len(times) - 1 - i), x
            x = _step(x, begin, end, past[:p])
        return x


Scales = tuple[Tensor, Tensor]
Call = tuple[Tensor, Tensor]


def _step(x: Tensor, begin: Scales, end: Scales, past: Sequence[Call], ahead: Tensor | None = None) -> Tensor:
    """x at `begin` -> x at `end`, from the estimates in `past`, whose first is at `begin`, and for the corrector `ahead`, at
    `end`.
    """
    (lambda_t, x_hat), sigma_t, (alpha_s, sigma_s) = past[0], begin[1], end
    h = torch.log(alpha_s / sigma_s) - lambda_t
    r = [(lambda_i - lambda_t) / h for lambda_i, _ in past[1:]]
    slopes = [(x_i - x_hat) / r_i for (_, x_i), r_i in zip(past[1:], r)]
    if ahead is not None:
        r, slopes = [*r, torch.ones_like(h)], [*slopes, ahead - x_hat]
    correction = sum(rho * slope for rho, slope in zip(_weights(r, h), slopes))
    return sigma_s / sigma_t * x - alpha_s * torch.expm1(-h) * (x_hat + correction)


def _weights(r: list[Tensor], h: Tensor) -> Sequence[float | Tensor]:
    """-> rho, the solution of equation 6; a single one is 1/2, which is accurate enough (appendix F)."""
    if len(r) < 2:
        return [0.5] * len(r)
    phi, right = torch.expm1(-h), []
    term = phi / -h - 1
    for i in range(1, len(r) + 1):
        right.append(term * math.factorial(i) / phi)
        term = term / -h - 1 / math.factorial(i + 1)
    powers = torch.stack([torch.stack(r) ** i for i in range(len(r))])
    return torch.linalg.solve(powers, torch.stack(right)).unbind()
