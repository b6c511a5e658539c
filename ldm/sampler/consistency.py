"""A consistency model's steps: to the data, and back to noise with fresh noise (https://arxiv.org/abs/2303.01469, algorithm 1).

x_s = alpha_s x_hat(x_t, t) + sigma_s noise, and x_hat at the end

Latent consistency models (https://arxiv.org/abs/2310.04378, algorithm 3) and distribution matching draw so too. Published ones
say c_out x_hat + c_skip x_t in the place of x_hat, with c_skip = 1/4 / (r^2 + 1/4), c_out = r / sqrt(r^2 + 1/4) and
r = scaling * (1000 t - 1), so that the estimate of a clean picture is that picture (section 4.1 and appendix C; LCMScheduler).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ldm.sampler._noise import Streams
from ldm.sampler._walk import Walk
from ldm.sampler.grid import UNIFORM
from ldm.types import Denoise, Schedule


@dataclass(frozen=True)
class Consistency(Walk):
    """For models whose estimate at any time is a finished picture. It calls the network once a step.

    `scaling`: of the steps of a table of 1000 in r above; None leaves the estimate as it is.
    """

    order: ClassVar[int] = 0  # it does not converge with more steps
    steps: int = 1
    scaling: float | None = None
    grid: Callable[[int, Schedule], Tensor] = UNIFORM

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """x: (B, C, H, W) at times[0] -> (B, C, H, W) at times[-1], along falling times: (steps + 1)."""
        draw = Streams(seeds)
        for t, s in pairwise(times.double().cpu()):
            x_hat, (alpha, sigma) = self._bounded(denoise(x, t), x, float(t)), schedule(s)
            x = alpha * x_hat + sigma * draw(x) if s > 0 else x_hat
        return x

    def _bounded(self, x_hat: Tensor, x: Tensor, t: float) -> Tensor:
        """x_hat and x: (B, C, H, W) at time t -> the estimate that meets x at the table's first step."""
        if self.scaling is None:
            return x_hat
        r, data = self.scaling * (1000 * t - 1), 0.25
        return r / (r**2 + data) ** 0.5 * x_hat + data / (r**2 + data) * x
