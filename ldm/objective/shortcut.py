"""Shortcut models (https://arxiv.org/abs/2410.12557): a step of any length is what two of half the length lead to.

    u(x_t, t, r) = (u(x_t, t, m) + u(x_m, m, r)) / 2,    m halfway, x_m = x_t - (t - m) u(x_t, t, m)          (equations 4 and 5)

where u is the average velocity on straight paths, as MeanFlow has it, and that of r = t is flow matching.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.objective._cond import each_slot
from ldm.objective.mean_flow import check_straight
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Denoiser, Draw, InTraining, Schedule, like


class Shortcut(Regression):
    """E ||u - stopgrad(target)||^2, for a share of the samples of two half steps, for the others of flow matching.

    The model needs a second time (`model.span`), `prediction=flow` and straight paths; it wants the average of callback ema,
    which takes the half steps. It is drawn from by `sampler=flow_map guidance=none`, in 1, 2, 4, ... steps. No derivatives are
    taken. Without the paper's guidance of the targets.

    Args:
        share: of samples with two times, a quarter in the paper; the global batch's samples take turns.
        steps: of the finest grid, a power of 2; half steps as short as its are told as none.
        **parts: time, weight, noise and distance, as in regression, of the samples of flow matching.

    Raises:
        Refusal: a share outside [0, 1], steps that are no power of 2, paths that are not straight, or another prediction.
    """

    def __init__(self, share: float = 0.25, steps: int = 128, **parts: Any) -> None:
        super().__init__(**parts)
        if not 0 <= share <= 1:
            raise Refusal(f"objective.share={share}: the part of samples with two times is from 0 to 1.")
        if steps < 2 or steps & (steps - 1):
            raise Refusal(f"objective.steps={steps}: steps are halved again and again; use a power of 2, such as 128.")
        self.share, self.steps = share, steps

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": ()}."""
        denoiser = model.denoiser
        check_straight(denoiser)
        t, to, two = self.times(draw, denoiser.schedule, x)
        t, to = (s.to(x, non_blocking=True) for s in (t, to))
        noise = self.noise(draw, x)
        alpha, sigma = (like(s, x) for s in denoiser.schedule(t))
        x_t, target = alpha * x + sigma * noise, noise - x
        if not len(two):
            output = denoiser.output(x_t, t, cond)
        else:
            some = each_slot(cond, lambda value: value[two])
            with torch.no_grad():
                halves = half_steps(model.average.denoiser, x_t[two], t[two], to[two], some, 1 / self.steps)
            target = target.index_copy(0, two.to(x.device, non_blocking=True), halves)
            output = denoiser.output(x_t, t, cond, to)
        return {"loss": self.error(denoiser, output - target, t).mean()}

    def times(self, draw: Draw, schedule: Schedule, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, H, W) -> t: (B), to: (B), to <= t, and which samples have two: (K); on the CPU."""
        turn = draw.position.double() * self.share
        two = ((turn + self.share).floor() > turn.floor()).nonzero().flatten()
        t = self.time_for(x)(draw.stratified("time"), schedule)
        length = 2.0 ** -(draw.uniform("length") * math.log2(self.steps)).floor()
        long = length * (1 + (draw.uniform("place") / length).floor())
        to = t.index_copy(0, two, (long - length)[two].to(t))
        return t.index_copy(0, two, long[two].to(t)), to, two


def half_steps(denoiser: Denoiser, x_t: Tensor, t: Tensor, to: Tensor, cond: Cond, finest: float) -> Tensor:
    """-> the average velocity of two steps by way of the middle: (B, C, H, W).

    Args:
        denoiser: the averaged model's.
        x_t: (B, C, H, W).
        t, to: (B) each, from where and to where.
        cond: the condition.
        finest: the length of the finest step; a half that is as short is told as none.
    """
    middle = (t + to) / 2
    short = t - middle <= finest
    first = denoiser.output(x_t, t, cond, torch.where(short, t, middle))
    begin, half, end = (like(denoiser.schedule(s)[1], x_t) for s in (t, middle, to))
    x_m = x_t - (begin - half) * first
    second = denoiser.output(x_m, middle, cond, torch.where(short, middle, to))
    return ((begin - half) * first + (half - end) * second) / (begin - end)
