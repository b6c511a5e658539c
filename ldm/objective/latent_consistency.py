"""Latent consistency distillation, LCM (https://arxiv.org/abs/2310.04378, algorithm 1): estimates along a teacher's path agree.

    E distance(x_hat(x_t, t) - stopgrad(x_hat'(x_s, s))),    x_s one DDIM step of the guided teacher from x_t

where x_hat' is the averaged model. Where the noise ends, x_hat is x_t itself, for predictions of noise, velocity and flow.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.objective._teacher import WithTeacher, again
from ldm.types import Batch, Cond, Draw, InTraining, like


class LatentConsistency(WithTeacher):
    """Distils a teacher into a model of one to four steps, drawn by sampler=consistency; it wants the average of callback ema.

    The model begins from the teacher (`model.init`). The teacher is in no checkpoint.

    Args:
        teacher: loads a trained model of the same latents and conditions.
        steps: of the teacher's from noise to data; each update takes one.
        scale: of the teacher's classifier-free guidance, which the model learns.
        **parts: time, weight, noise and distance, as in regression; steps begin at these times, and weights are of the estimate.

    Raises:
        Refusal: a prediction whose estimate without noise is not what it sees, or a teacher of another schedule.
    """

    def __init__(self, teacher: Callable[[], Any], steps: int = 50, scale: float = 2.0, **parts: Any) -> None:
        super().__init__(teacher, **parts)
        self.steps, self.scale = steps, scale

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": ()}."""
        schedule = model.denoiser.schedule
        self.teacher.check_schedule(schedule)
        check_end(model.denoiser.prediction)
        u = self.time_for(x)(draw.stratified("time"), schedule).to(x, non_blocking=True)
        t = ((u * self.steps).ceil() / self.steps).clamp(min=1 / self.steps)
        s = t - 1 / self.steps
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (tuple(like(v, x) for v in schedule(time)) for time in (t, s))
        x_t = alpha_t * x + sigma_t * self.noise(draw, x)
        parts = model.conditioner.parts(batch)  # nothing is dropped: guidance is learned
        with torch.no_grad():
            teacher_cond = self.teacher.condition(batch, parts)
            null = self.teacher.null(model, batch, parts, len(x)) if self.scale != 1 else None
            there = self.teacher.guided(teacher_cond, null, self.scale)(x_t, t)
            x_s = alpha_s * there + sigma_s * (x_t - alpha_t * there) / sigma_t
            target = model.average.denoiser(x_s, s, again(model, batch, parts))
            target = torch.where(like(s, x) > 0, target, x_s)
        x_hat = model.denoiser(x_t, t, sum(parts.values(), Cond()))
        one = torch.ones_like(t)
        weight = self.weight(*(v.flatten() for v in (alpha_t, sigma_t)), one)
        return {"loss": (weight * self.distance(x_hat - target).flatten(1).mean(1)).mean()}


def check_end(prediction: Any) -> None:
    """Raises Refusal where an estimate of what has no noise is something else than that."""
    one = torch.ones((), dtype=torch.float64)
    if (prediction.to_data(0 * one, one, one, 0 * one) - 1).abs() > 1e-6:
        raise Refusal(
            f"objective=latent_consistency with prediction={type(prediction).__name__.lower()}: of what has no noise its "
            "estimate may be anything, and agreement alone would lead nowhere; use prediction=flow, velocity or noise."
        )
