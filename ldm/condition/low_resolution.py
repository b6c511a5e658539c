"""The same picture at a lower resolution: super-resolution (https://arxiv.org/abs/2112.10752, section 4.4)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.condition._degrade import bicubic
from ldm.condition._files import numbers, read_pictures
from ldm.condition._masks import key_generator
from ldm.embedder import Condition, Input
from ldm.nn.sinusoid import sinusoid
from ldm.types import Autoencoder, Batch, Cond, Draw, Widths


class LowResolution(Condition):
    """A picture `scale` times smaller -> its colours beside the latents, brought to their size where they differ.

    Where the batch has no field `low`, `degrade` makes it from `image`. With noise it becomes sqrt(1 - level^2) low + level
    normal, the `level` drawn from 0 to `noise` in training, and is told as 256 waves (noise-conditioning augmentation,
    https://arxiv.org/abs/2106.15282, section 4.2); in requests it is `ask.level`, 0 if not said.

    Args:
        autoencoder: the model's, whose factor says how large the latents are.
        scale: how many times smaller the picture is, a side.
        degrade: (image (1, 3, h, w) in [-1, 1], scale, generator) -> the small picture.
        noise: the highest level of noise in training, in [0, 1]; 0 adds none.
        rate: the share of samples for which the picture is dropped in training, in [0, 1]; then it is zeros.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        scale: int = 4,
        degrade: Callable[[Tensor, int, torch.Generator], Tensor] = bicubic,
        noise: float = 0.0,
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.factor, self.scale, self.degrade, self.noise, self.rate = autoencoder.factor, scale, degrade, noise, rate
        self.key = ("low", "level", "low_noise") if noise else "low"
        self.widths = Widths(spatial=3, vector=256 if noise else 0)

    def forward(self, value: Any, drop: Tensor) -> Cond:
        """value: pictures (B, 3, h, w) in [-1, 1], or these, levels (B) and noise -> spatial: (B, 3, H, W), vector: (B, 256)."""
        vector, low = None, value
        if self.noise:
            low, level, noise = value
            scale = level.to(low)[:, None, None, None]
            low, vector = (1 - scale.square()).sqrt() * low + scale * noise.to(low), sinusoid(1000 * level.to(low), 256)
        size = [side * self.scale // self.factor for side in low.shape[2:]]
        spatial = low if size == list(low.shape[2:]) else interpolate(low, size, mode="bicubic", antialias=True)
        return Cond(spatial=spatial * (~drop).to(spatial, non_blocking=True)[:, None, None, None], vector=vector)

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Tensor]:
        """The low resolution of `image`, where the batch has none, the level of its noise, and the noise."""
        made: dict[str, Tensor] = {}
        if "low" not in batch and "image" in batch:
            made["low"] = self._degraded(batch, draw)
        low = made.get("low", batch.get("low"))
        if low is None or not self.noise:
            return made
        if "level" not in batch:
            made["level"] = torch.zeros(len(low)) if draw is None else self.noise * draw.uniform("level")
        if "low_noise" not in batch:
            same = torch.randn(low.shape[1:], generator=torch.Generator().manual_seed(0)).expand(low.shape)
            made["low_noise"] = same if draw is None else draw.normal("low", low.shape[1:])
        return made

    def _degraded(self, batch: Batch, draw: Draw | None) -> Tensor:
        keys = batch.get("key") or [""] * len(batch["image"])
        positions = [None] * len(keys) if draw is None else draw.position.tolist()
        generators = [key_generator(key, position) for key, position in zip(keys, positions)]
        return torch.cat([self.degrade(image[None], self.scale, g) for image, g in zip(batch["image"], generators)])

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Files of small pictures -> (N, 3, height / scale, width / scale) in [-1, 1]; or levels -> (N)."""
        if field == "level":
            return numbers(field, values, 0, self.noise)
        return read_pictures(field, values, (size[0] // self.scale, size[1] // self.scale))

    def input(self, field: str) -> Input | None:
        """A small picture, and a number: how much noise it has."""
        made = {"low": Input("picture"), "level": Input("number", low=0, high=self.noise, usual=0)}
        return made.get(field)

    def show(self, value: Any) -> Tensor:
        """value: as in `forward` -> the small pictures."""
        return value[0] if self.noise else value
