"""Preferences between two pictures of one request: Diffusion-DPO (https://arxiv.org/abs/2311.12908, equation 14).

    E - log sigmoid(- beta / 2 ((e(better) - e'(better)) - (e(worse) - e'(worse))))

with e and e' the model's and a frozen reference's mean squared errors, at one time and one noise for all four; of flow models the
same with the flow's errors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ldm.errors import Refusal
from ldm.objective._teacher import WithTeacher
from ldm.types import Batch, Cond, Denoiser, Draw, InTraining, like


class Preference(WithTeacher):
    """Tunes a finished model (`model.init`) on pairs: `image` is the better picture, the field `worse` the other.

    At the reference the loss is log 2. The reference is in no checkpoint.

    Args:
        teacher: loads the reference: the model that training begins from.
        beta: how dearly the model's distance from the reference is paid for; 2000 and 5000 in the paper.
        worse: the batch field of the other picture, such as `+data.fields.worse=worse.jpg`.
        **parts: time, weight, noise and distance, as in regression.

    Raises:
        Refusal: the batch has no such field, or the reference has another schedule.
    """

    def __init__(self, teacher: Callable[[], Any], beta: float = 5000.0, worse: str = "worse", **parts: Any) -> None:
        super().__init__(teacher, **parts)
        self.beta, self.worse = beta, worse

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W), latents of the better pictures -> {"loss": (), "preferred": ()}, the latter the share of pairs won."""
        if self.worse not in batch:
            raise Refusal(
                f"objective=preference reads the worse picture of each pair from the field {self.worse!r}, and the batch has "
                f"{sorted(batch)}: +data.fields.{self.worse}=MEMBER, such as worse.jpg."
            )
        self.teacher.check_schedule(model.denoiser.schedule)
        moments = model.encode(batch[self.worse])
        other = moments.sample(draw.normal("posterior/worse", moments.mean.shape[1:]))
        parts = model.conditioner.parts(batch)  # nothing is dropped: a preference is of a request
        model_cond, teacher_cond = sum(parts.values(), Cond()), self.teacher.condition(batch, parts)
        t = self.time_for(x)(draw.stratified("time"), model.denoiser.schedule).to(x, non_blocking=True)
        noise = self.noise(draw, x)
        margin = self.margin(model.denoiser, x, other, model_cond, t, noise)
        with torch.no_grad():
            reference = self.margin(self.teacher.denoiser, x, other, teacher_cond, t, noise)
        logits = -self.beta / 2 * (margin - reference)
        return {"loss": -logsigmoid(logits).mean(), "preferred": (logits > 0).float().mean()}

    def margin(self, denoiser: Denoiser, better: Tensor, worse: Tensor, cond: Cond, t: Tensor, noise: Tensor) -> Tensor:
        """-> how much larger the error of the better picture is: (B).

        Args:
            denoiser: the model's, or the reference's.
            better, worse: (B, C, H, W) clean latents.
            cond: their condition.
            t, noise: (B), and (B, C, H, W); the same for both.
        """
        x, t, noise = torch.cat((better, worse)), t.repeat(2), noise.repeat(2, 1, 1, 1)
        alpha, sigma = (like(s, x) for s in denoiser.schedule(t))
        output = denoiser.output(alpha * x + sigma * noise, t, cond.stack(cond))
        errors = self.error(denoiser, output - denoiser.prediction.target(x, noise, alpha, sigma), t)
        return errors[: len(better)] - errors[len(better) :]
