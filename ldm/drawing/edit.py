"""Drawing that begins from a picture: image-to-image, inpainting, inversion. Each is a sampler around a sampler.

FromPicture    x_t = alpha_t picture + sigma_t noise, then the sampler from t to 0
FromInversion  the sampler from 0 up to t, as another request is denoised, then down to 0
Inpainting     the sampler, with mask x_s + (1 - mask) (alpha_s picture + sigma_s noise) after every step

`picture` are latents, (B, C, H, W), or (1, C, H, W) for one that all begin from. `strength`, in [0, 1], is the share of the
sampler's times that is walked: 0 (or too little for one step) gives the picture back, 1 keeps next to nothing of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.sampler._noise import Streams
from ldm.types import Denoise, Sampler, Schedule, mix


@dataclass(frozen=True)
class FromPicture:
    """Image-to-image: adds noise to the picture and denoises from there (SDEdit, https://arxiv.org/abs/2108.01073)."""

    sampler: Sampler
    picture: Tensor
    strength: float = 0.6

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W), unit normal; seeds: one a picture -> x: (B, C, H, W)."""
        times = last_part(self.sampler.times(schedule, noise.shape[2:]), self.strength)
        if len(times) == 1:
            return self.picture.to(noise).expand_as(noise)
        x = noised(self.picture.to(noise), schedule, times[0], noise)
        return self.sampler.walk(denoise, schedule, x, times, seeds)


@dataclass(frozen=True)
class FromInversion:
    """Inverts the picture to noise, and denoises that as the request says.

    `source`, called with the number of pictures, gives the estimate by which they are inverted. With a deterministic sampler and
    the same request the picture comes back, up to the sampler's error (DDIM, https://arxiv.org/abs/2010.02502, section 4.3); with
    another request it is edited.
    """

    sampler: Sampler
    picture: Tensor
    source: Callable[[int], Denoise]
    strength: float = 1.0

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W), of which only the shape is used; seeds: one a picture -> x: (B, C, H, W).

        Raises:
            Refusal: the sampler cannot be walked upwards.
        """
        times = last_part(self.sampler.times(schedule, noise.shape[2:]), self.strength)
        if len(times) == 1:
            return self.picture.to(noise).expand_as(noise)
        x = schedule(times[-1])[0] * self.picture.to(noise).expand_as(noise)
        x = self.sampler.walk(self.source(len(x)), schedule, x, times.flip(0), seeds)
        if not x.isfinite().all():
            raise Refusal(f"{type(self.sampler).__name__} cannot be walked from data to noise; invert with sampler=ddim.")
        return self.sampler.walk(denoise, schedule, x, times, seeds)


@dataclass(frozen=True)
class Inpainting:
    """Draws inside the mask; outside, the noised picture replaces x after every step (RePaint, https://arxiv.org/abs/2201.09865,
    algorithm 1 with jumps of one step).

    Args:
        sampler: whose steps are taken.
        picture: (B or 1, C, H, W) latents.
        mask: (B or 1, 1, H, W) in {0, 1}, 1 where it is drawn.
        resamples: how often each step is taken, at least once, with noise added back in between, so that the two parts agree.
        strength: the share of the sampler's times that is walked, in [0, 1].

    Raises:
        Refusal: resamples < 1.
    """

    sampler: Sampler
    picture: Tensor
    mask: Tensor
    resamples: int = 4
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise Refusal(f"resamples={self.resamples}: each step is taken at least once.")

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W), unit normal; seeds: one a picture -> x: (B, C, H, W), `picture` itself outside the mask."""
        picture, redrawn = self.picture.to(noise), self.mask.to(noise) > 0
        times = last_part(self.sampler.times(schedule, noise.shape[2:]), self.strength)
        if len(times) == 1:
            return picture.expand_as(noise)
        x = noised(picture, schedule, times[0], noise)
        draw = Streams([mix(seed, 2) for seed in seeds])
        for i in range(len(times) - 1):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(times[i]), schedule(times[i + 1])
            for again in range(self.resamples):
                leg = [mix(seed, i, again) for seed in seeds]
                x = self.sampler.walk(denoise, schedule, x, times[i : i + 2], leg)
                x = torch.where(redrawn, x, noised(picture, schedule, times[i + 1], draw(x)))
                if again < self.resamples - 1:
                    added = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).sqrt()
                    x = alpha_t / alpha_s * x + added * draw(x)
        return torch.where(redrawn, x, picture)


def last_part(times: Tensor, strength: float) -> Tensor:
    """times: (steps + 1) -> the last (strength * steps + 1) of them, rounded.

    Raises:
        Refusal: a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise Refusal(f"strength={strength}: it is the part of the steps to walk, from 0 (the picture) to 1 (drawn anew).")
    return times[round((1 - strength) * (len(times) - 1)) :]


def noised(picture: Tensor, schedule: Schedule, t: Tensor, noise: Tensor) -> Tensor:
    """picture: (B or 1, C, H, W), t: (), noise: (B, C, H, W), unit normal -> x_t: (B, C, H, W)."""
    alpha, sigma = schedule(t)
    return alpha * picture + sigma * noise
