"""Steps of a flow map, which predicts where the flow from x_t is at a second time s: one, two or four make a picture.

x_s = alpha_s x_hat + sigma_s (x_t - alpha_t x_hat) / sigma_t,  x_hat = D(x_t, t, s)

So draw average velocities (MeanFlow, https://arxiv.org/abs/2505.13447, equation 12), consistency trajectories
(https://arxiv.org/abs/2310.02279, equation 4) and shortcut models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ldm.sampler._walk import Walk
from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class FlowMap(Walk):
    """Exact for an exact flow map, with any number of steps. It calls the network once a step."""

    order: ClassVar[int] = 1
    steps: int = 1
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along times: (steps + 1)."""
        for t, s in pairwise(times.double().cpu()):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
            x_hat = denoise(x, t, s)
            x = alpha_s * x_hat + sigma_s * (x - alpha_t * x_hat) / sigma_t
        return x
