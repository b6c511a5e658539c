"""Consistency models in continuous time: sCM (https://arxiv.org/abs/2410.11081), for pictures in one or two steps.

f(x_t, t) = cos(a) x_t - sin(a) F(x_t, t),    a = atan2(sigma, alpha),  F the network that predicts the velocity dx/da
g = - cos^2(a) (F - dx/da) - r cos(a) sin(a) (x_t + dF/da),    cos(a) df/da where r = 1                     (equation 8)
loss = || F - stopgrad(F + g / (||g|| + c)) ||^2
"""

from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.objective._jacobian import along
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Denoiser, Draw, InTraining, like


class Consistency(Regression):
    """Trains the estimate from any noise to be the picture that the flow leads to, from data alone; drawn by sampler=consistency.

    It wants `schedule=cosine prediction=velocity`, and a noise level that does not run away, `level=data_time`; a model that
    was trained plainly is a good beginning (`model.init`).

    Args:
        warmup: steps in which r, the part of the tangent that comes from the network's derivative, rises from 0 to 1.
        c: what the tangent's length is added to before it is divided by the sum; lengths are root mean squares over numbers.
        **parts: time, weight, noise and distance, as in regression.

    Raises:
        Refusal: the schedule does not keep the variance, or the network predicts something else.
    """

    def __init__(self, warmup: int = 10_000, c: float = 0.1, **parts: Any) -> None:
        super().__init__(**parts)
        self.warmup, self.c = warmup, c

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": (), "tangent": ()}, the latter the length of g before it is divided."""
        denoiser = model.denoiser
        check_circle(denoiser)
        t, noise, alpha, sigma = self.drawn(x, denoiser.schedule, draw)
        r = min(1.0, draw.step / self.warmup) if self.warmup else 1.0
        output, g = tangent(denoiser, alpha * x + sigma * noise, t, cond, alpha * noise - sigma * x, r)
        length = g.square().flatten(1).mean(1).sqrt()
        target = output.detach() + g / like(length + self.c, g)
        return {"loss": self.error(denoiser, output - target, t).mean(), "tangent": length.mean()}


def tangent(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, velocity: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """-> the network's output and g without gradients, (B, C, H, W) each.

    The derivative is taken along cos(a) sin(a) times the direction, which keeps it bounded at both ends.

    Args:
        denoiser: the network and its schedule, on the circle.
        x_t, t: (B, C, H, W) and (B), the place.
        cond: the condition there.
        velocity: dx/da of the sample, (B, C, H, W).
        r: how much of the network's own derivative counts, in [0, 1].
    """
    (alpha, sigma), (rate, _) = torch.func.jvp(denoiser.schedule, (t,), (torch.ones_like(t),))
    pace = alpha * sigma / (-rate / sigma)  # of t, as a moves by cos(a) sin(a): da/dt = -(d alpha/dt) / sigma
    alpha, sigma = like(alpha, x_t), like(sigma, x_t)
    output, change = along(denoiser, x_t, t, cond, (alpha * sigma * velocity, pace))
    g = -(alpha**2) * (output.detach() - velocity) - r * (alpha * sigma * x_t + change)
    return output, g


def check_circle(denoiser: Denoiser) -> None:
    """Raises Refusal where alpha^2 + sigma^2 is not 1, or the network does not predict the velocity on that circle."""
    alpha, sigma = denoiser.schedule(torch.tensor(0.25, dtype=torch.float64))
    one = torch.ones((), dtype=torch.float64)
    if (alpha**2 + sigma**2 - 1).abs() > 1e-9 or (denoiser.prediction.target(one, 0 * one, alpha, sigma) + sigma).abs() > 1e-9:
        raise Refusal(
            f"objective=consistency goes along a circle: schedule=cosine prediction=velocity; found "
            f"schedule={type(denoiser.schedule).__name__} prediction={type(denoiser.prediction).__name__.lower()}."
        )
