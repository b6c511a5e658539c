"""Reward gradients through the last steps of drawing: DRaFT-K (https://arxiv.org/abs/2309.17400, section 4).

loss = - E reward(decode(x_0)),    x_0 drawn by `steps` steps of DDIM, of which the last `last` are differentiated
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Batch, Cond, Draw, InTraining, Schedule


@dataclass(frozen=True)
class Colour:
    """The reward of pictures near one colour: - mean (image - colour)^2 over pixels and channels."""

    colour: Sequence[float] = (-1.0, -1.0, 1.0)

    def __call__(self, images: Tensor, batch: Batch) -> Tensor:
        """images: (B, 3, h, w) in [-1, 1] -> (B), at most 0."""
        return -(images - images.new_tensor(list(self.colour))[:, None, None]).square().flatten(1).mean(1)


class Reward(nn.Module):
    """Tunes a finished model (`model.init`, or an adapter beside it) until its drawings have a higher reward.

    The batch's pictures are not looked at. Nothing holds the model near what it was but few steps: adapters with a strength, or
    a low rate.

    Args:
        reward: (images (B, 3, h, w) in [-1, 1], batch) -> (B), differentiable; the higher, the better.
        steps: of a drawing, at equal distances in t.
        last: of them that gradients pass through, 1 in DRaFT-1; each holds the activations of the network once more.
        scale: of classifier-free guidance in drawing; 1 is none.

    Raises:
        Refusal: fewer than one step, or more to differentiate than there are.
    """

    def __init__(self, reward: Callable[[Tensor, Batch], Tensor], steps: int = 20, last: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        if not 1 <= last <= steps:
            raise Refusal(f"objective.last={last} of objective.steps={steps}: gradients pass through 1 step or more, of all.")
        self.reward, self.steps, self.last, self.scale = reward, steps, last, scale

    def meet(self, model: Any) -> bool:
        """Nothing is shared; conditions are read here, and nothing is dropped."""
        return True

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W), of which only the shape counts -> {"loss": (), "reward": ()}."""
        full = model.condition(batch)
        null = model.condition(batch, only=()) if self.scale != 1 else None

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x_hat = model.denoiser(x_t, t, full)
            if null is None:
                return x_hat
            x_null = model.denoiser(x_t, t, null)
            return x_null + self.scale * (x_hat - x_null)

        noise = draw.normal("drawn", x.shape[1:]).to(x, non_blocking=True)
        reward = self.reward(model.decode(draw_last(denoise, model.denoiser.schedule, noise, self.steps, self.last)), batch)
        return {"loss": -reward.mean(), "reward": reward.mean().detach()}


def draw_last(denoise: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, noise: Tensor, steps: int, last: int) -> Tensor:
    """-> what sampler=ddim draws: (B, C, H, W).

    Args:
        denoise: (x_t, t) -> x_hat.
        schedule: of the paths.
        noise: (B, C, H, W), unit normal.
        steps: at equal distances in t, from 1 to 0.
        last: so many steps at the end have gradients.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    start, *levels = (value.to(noise, non_blocking=True) for value in (torch.hypot(*schedule(times[0])), times, *schedule(times)))
    x = start * noise
    for i, ((t, alpha_t, sigma_t), (_, alpha_s, sigma_s)) in enumerate(pairwise(zip(*levels))):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - last):
            x_hat = denoise(x, t)
            x = alpha_s * x_hat + sigma_s / sigma_t * (x - alpha_t * x_hat)
    return x
