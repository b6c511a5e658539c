"""SDE-DPM-Solver++(2M) (https://arxiv.org/abs/2211.01095, section 5 and appendix D.2).

x_s = (sigma_s / sigma_t) e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) noise,  h and D as in dpmpp.py
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ldm.sampler._noise import Streams
from ldm.sampler._walk import Walk
from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class DPMppSDE(Walk):
    """Second order in the drift, stochastic. It calls the network once a step.

    The step into t = 0 is first order, as in `DPMpp`.
    """

    order: ClassVar[int] = 2
    steps: int = 25
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along falling times: (steps + 1)."""
        draw = Streams(seeds)
        last, h_last = None, None
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            h = torch.log(alpha_s / sigma_s) - torch.log(alpha_t / sigma_t)
            x_hat = denoise(x, t)
            ahead = x_hat if last is None or s == 0 else x_hat + (x_hat - last) * h / h_last / 2
            fresh = -torch.expm1(-2 * h)
            x = sigma_s / sigma_t * torch.exp(-h) * x + alpha_s * fresh * ahead + sigma_s * fresh.sqrt() * draw(x)
            last, h_last = x_hat, h
        return x
