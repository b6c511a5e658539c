"""Flow maps on straight paths: MeanFlow (https://arxiv.org/abs/2505.13447), for pictures in one, two or four steps.

    u(x_t, t, r) = v - (sigma_t - sigma_r) du/dsigma,    the average velocity from t to r (equation 6)

where v = noise - x is the sample's velocity and du/dsigma the total derivative along it, taken from the network itself.
"""

from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.objective._jacobian import along
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Denoiser, Draw, InTraining, Schedule, like


class MeanFlow(Regression):
    """E ||u - stopgrad(target)||^2 / stopgrad(||u - target||^2 + c)^power, norms as means over numbers; told t and r <= t.

    Where r = t it is flow matching. The model needs a second time (`model.span`), `prediction=flow`, and straight paths;
    `level=data_time` keeps derivatives by time small. It is drawn from by `sampler=flow_map guidance=none`.

    Args:
        share: of samples for which r < t; the others learn plain flow matching.
        scale: of classifier-free guidance that the map learns (section 4.2, kappa = 0), so that drawing needs no second call.
        power: how far errors count alike: 1 as in the paper, 0 for plain squares.
        c: keeps the weight of small errors finite.
        **parts: time, weight, noise and distance, as in regression; of two times that are drawn the larger is t, the smaller r.

    Raises:
        Refusal: a share outside [0, 1], paths that are not straight, or another prediction.
    """

    def __init__(self, share: float = 0.25, scale: float = 1.0, power: float = 1.0, c: float = 1e-3, **parts: Any) -> None:
        super().__init__(**parts)
        if not 0 <= share <= 1:
            raise Refusal(f"objective.share={share}: the part of samples with two times is from 0 to 1.")
        self.share, self.scale, self.power, self.c = share, scale, power, c

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": (), "error": ()}, the latter the plain squared error."""
        denoiser = model.denoiser
        check_straight(denoiser)
        t, to = (s.to(x, non_blocking=True) for s in self.times(draw, denoiser.schedule, x))
        noise = self.noise(draw, x)
        alpha, sigma = (like(s, x) for s in denoiser.schedule(t))
        x_t, velocity = alpha * x + sigma * noise, noise - x
        if self.scale != 1:
            with torch.no_grad():
                null = denoiser.output(x_t, t, model.condition(batch, only=()))
            velocity = self.scale * velocity + (1 - self.scale) * null
        if self.share == 0:
            output, target = denoiser.output(x_t, t, cond), velocity
        else:
            output, target = mean_velocity(denoiser, x_t, t, to, cond, velocity)
        error = self.error(denoiser, output - target, t)
        loss = error / (error.detach() + self.c) ** self.power
        return {"loss": loss.mean(), "error": error.mean()}

    def times(self, draw: Draw, schedule: Schedule, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) -> t and to: (B) each, to <= t, on the CPU."""
        time = self.time_for(x)
        first, second = (time(u, schedule) for u in (draw.stratified("time"), draw.uniform("to")))
        two = draw.uniform("span") < self.share
        return torch.where(two, torch.maximum(first, second), first), torch.where(two, torch.minimum(first, second), first)


def mean_velocity(denoiser: Denoiser, x_t: Tensor, t: Tensor, to: Tensor, cond: Cond, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """-> the network's average velocity from t to `to`, and what it should be, without gradients: (B, C, H, W) each.

    Args:
        denoiser: the network and its schedule, of straight paths.
        x_t: (B, C, H, W).
        t, to: (B) each, from where and to where, to <= t.
        cond: the condition.
        velocity: of the sample, (B, C, H, W).
    """
    (_, sigma), (_, rate) = torch.func.jvp(denoiser.schedule, (t,), (torch.ones_like(t),))
    rate = like(rate, x_t)
    output, change = along(denoiser, x_t, t, cond, (velocity * rate, torch.ones_like(t)), to)
    way = like(sigma - denoiser.schedule(to)[1], x_t)
    return output, velocity - way / rate * change


def check_straight(denoiser: Denoiser) -> None:
    """Raises Refusal where the network says no velocity along straight paths, alpha + sigma = 1."""
    half = torch.tensor(0.5, dtype=torch.float64)
    (alpha, sigma), one = denoiser.schedule(half), torch.ones((), dtype=torch.float64)
    if (alpha + sigma - 1).abs() > 1e-9 or denoiser.prediction.target(one, 0 * one, alpha, sigma) + 1:
        raise Refusal(
            f"Average velocities are of straight paths: schedule=linear prediction=flow; found "
            f"schedule={type(denoiser.schedule).__name__} prediction={type(denoiser.prediction).__name__.lower()}."
        )
