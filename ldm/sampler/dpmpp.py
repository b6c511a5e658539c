"""DPM-Solver++(2M) (https://arxiv.org/abs/2211.01095, algorithm 2).

x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) D,  h = lambda_s - lambda_t,  lambda = log(alpha / sigma)
D = x_hat + (h / h') (x_hat - x_hat') / 2, with x_hat' and h' of the step before
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ldm.sampler._walk import Walk
from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class DPMpp(Walk):
    """Second order. It calls the network once a step.

    The step into t = 0 is first order: h is so long there that extrapolating over it does harm.
    """

    order: ClassVar[int] = 2
    steps: int = 20
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        last, h_last = None, None
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            h = torch.log(alpha_s / sigma_s) - torch.log(alpha_t / sigma_t)
            x_hat = denoise(x, t)
            ahead = x_hat if last is None or s == 0 else x_hat + (x_hat - last) * h / h_last / 2
            x = sigma_s / sigma_t * x - alpha_s * torch.expm1(-h) * ahead
            last, h_last = x_hat, h
        return x
