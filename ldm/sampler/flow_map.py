"""Steps of a flow map, which says where the flow from t is at `to`: one, two or four make a picture.

Average velocities (MeanFlow, https://arxiv.org/abs/2505.13447, equation 12) and all else that tells it as a point x_hat on the
line from x_t (consistency trajectories, https://arxiv.org/abs/2310.02279, equation 4; shortcut models).
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
    """Exact for an exact map, whatever the steps; calls the network once a step. Without a second time it is Euler's method."""

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
