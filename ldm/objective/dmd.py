"""A few-step model whose pictures are distributed as a teacher's: DMD (https://arxiv.org/abs/2311.18828, 2405.14867).

    gradient at a drawn x = (fake(x_t) - real(x_t)) / mean |x - real(x_t)|                                   (equations 7 and 8)

`real` is the teacher's estimate of the data and `fake` that of a network which learns, as x change, to denoise the drawn ones:
their difference is sigma^2 / alpha times that of the two scores, and so the way that brings the two distributions together.

With DMD2's discriminator, a head on the hidden states of `fake`, the model also learns to be taken for the data:

    loss + adversarial softplus(-D(drawn)),    critic + softplus(D(drawn)) + softplus(-D(data)),    both seen through noise  (4.3)
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ldm.errors import Refusal
from ldm.objective._ear import Ear, as_map, block_of, features_of
from ldm.objective._teacher import WithTeacher
from ldm.types import Backbone, Batch, Cond, Denoise, Draw, InTraining, Schedule, Widths, like, mix


class DMD(WithTeacher):
    """Draws by the model's own `steps` and moves what it drew. Drawn by sampler=consistency.

    The model begins from the teacher (`model.init`), as `fake` does. `fake` is the critic: it has an optimizer of its own, is in
    checkpoints, and is neither averaged nor exported. Without a discriminator no picture of the data is looked at.

    Args:
        teacher: loads a trained model of the same latents and conditions.
        steps: at times 1, 1 - 1 / steps, ...; each update draws up to one of them, by the model's own steps (DMD2, 4.5).
        scale: of the teacher's classifier-free guidance, which the model learns.
        adversarial: weight of the discriminator, which is a part of the critic; 0 leaves it out.
        layer: the block of `fake` on which it stands, 1 is the first; None: the middle one.
        width: features of that block's hidden states; None: what the teacher has there.
        **parts: time, weight, noise and distance, as in regression: the noise that both look through, and the loss of `fake`.

    Raises:
        Refusal: less than one step, a teacher of another schedule, or another width than the discriminator's.
    """

    def __init__(
        self,
        teacher: Callable[[], Any],
        steps: int = 4,
        scale: float = 2.0,
        adversarial: float = 0.0,
        layer: int | None = None,
        width: int | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(teacher, **parts)
        if steps < 1:
            raise Refusal(f"objective.steps={steps}: at least one step makes a picture.")
        self.steps, self.scale = steps, scale
        self.fake = copy.deepcopy(self.teacher.denoiser).requires_grad_(True)
        self.adversarial = adversarial
        self.layer = layer or len(list(self.fake.backbone.blocks)) // 2 + 1
        self.judge = Judge(self.fake.backbone, self.layer, width) if adversarial and width is not None else None
        self.critic = ("fake", "judge.head") if adversarial else ("fake",)

    def meet(self, model: Any) -> bool:
        """Leaves to the model what it has too, and makes the discriminator for the hidden states, where no width is said."""
        super().meet(model)
        if self.adversarial and self.judge is None:
            backbone, widths = self.fake.backbone, self.teacher.conditioner.widths + Widths(vector=self.fake.span)
            self.judge = Judge(backbone, self.layer, features_of(backbone, self.layer, model.autoencoder.channels, widths))
        return True

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents, which a discriminator alone looks at -> {"loss": (), "critic": ()}, the former for its
        gradient alone, and with a discriminator the share of pictures that it judges rightly as `caught`.
        """
        schedule = model.denoiser.schedule
        self.teacher.check_schedule(schedule)
        parts = model.conditioner.parts(batch)  # nothing is dropped: guidance is learned
        cond, teacher_cond = sum(parts.values(), Cond()), self.teacher.condition(batch, parts)
        drawn = draw_along(lambda x_t, t: model.denoiser(x_t, t, cond), schedule, self._times(draw), x, draw)
        t = self.time_for(x)(draw.stratified("time"), schedule).to(x, non_blocking=True)
        noise = self.noise(draw, drawn.detach())
        alpha, sigma = (like(s, x) for s in schedule(t))
        x_t = alpha * drawn + sigma * noise
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.judge is not None):
            fake = self.fake(x_t, t, teacher_cond)
        passed = None if self.judge is None else self.judge(x, self.fake.backbone)
        with torch.no_grad():
            null = self.teacher.null(model, batch, parts, len(x)) if self.scale != 1 else None
            real = self.teacher.guided(teacher_cond, null, self.scale)(x_t, t)
            way = direction(drawn, real, fake)
        loss = (drawn - (drawn - way).detach()).square().mean() / 2
        fresh = Draw(mix(draw.seed, 1), draw.position, draw.batch, draw.step)
        critic = self.each(self.fake, drawn.detach(), teacher_cond, fresh)[0].mean()
        if self.judge is None:
            return {"loss": loss, "critic": critic}
        of_drawn, of_data = self.judge(x, self.fake.backbone), self._of_data(x, teacher_cond, fresh)
        critic = critic + softplus(of_drawn).mean() + softplus(-of_data).mean()
        caught = ((of_drawn < 0).float().mean() + (of_data > 0).float().mean()) / 2
        return {"loss": loss + self.adversarial * softplus(-passed).mean(), "critic": critic, "caught": caught.detach()}

    def _of_data(self, x: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """What the discriminator says of the data through noise, at the times at which it saw what was drawn."""
        schedule = self.fake.schedule
        t = self.time_for(x)(draw.stratified("time"), schedule).to(x, non_blocking=True)
        alpha, sigma = (like(s, x) for s in schedule(t))
        self.fake(alpha * x + sigma * self.noise(Draw(mix(draw.seed, 2), draw.position, draw.batch), x), t, cond)
        return self.judge(x, self.fake.backbone)

    def _times(self, draw: Draw) -> list[float]:
        """The first so many of the times, as many on every process."""
        count = mix(draw.seed, draw.step) % self.steps + 1
        return [1 - i / self.steps for i in range(count)]


class Judge(nn.Module):
    """A head on a block of a network: whether what that saw last is data, a logit each patch."""

    def __init__(self, backbone: Backbone, layer: int, width: int) -> None:
        super().__init__()
        self.width, self.layer, self.ear = width, layer, Ear()
        self.ear.put(block_of(backbone, self.layer))
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor, backbone: Backbone) -> Tensor:
        """x: (B, C, H, W), the shape of what the backbone saw -> (B, 1, h, w)."""
        hidden = as_map(self.ear.take(), x, backbone)
        if hidden.shape[1] != self.width:
            features = hidden.shape[1]
            raise Refusal(
                f"Block {self.layer} of fake says {features} features a patch: objective.width={features} (found {self.width})."
            )
        return self.head(hidden)


def direction(drawn: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """What was drawn and the two estimates, (B, C, H, W) each -> the gradient at what was drawn."""
    return (fake - real) / like((drawn - real).abs().flatten(1).mean(1).clamp(min=1e-6), drawn)


def draw_along(denoise: Denoise, schedule: Schedule, times: Sequence[float], x: Tensor, draw: Draw) -> Tensor:
    """-> the estimate at the last of the times, (B, C, H, W), by sampler=consistency; gradients reach that one alone.

    Args:
        denoise: (x_t, t) -> x_hat.
        schedule: of the noise that is added before each step.
        times: falling, the first is where pure noise lies.
        x: (B, C, H, W), of which the shape counts.
        draw: the numbers of the noise.
    """
    x_hat = x
    for i, time in enumerate(times):
        t = torch.full((len(x),), time, device=x.device, dtype=x.dtype)
        alpha, sigma = (like(s, x) for s in schedule(t))
        noise = draw.normal(f"drawn/{i}", x.shape[1:]).to(x, non_blocking=True)
        x_t = torch.hypot(alpha, sigma) * noise if i == 0 else alpha * x_hat + sigma * noise
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == len(times) - 1):
            x_hat = denoise(x_t, t)
    return x_hat
