"""A noised small picture beside the latents, as Stable Diffusion's x4 upscaler is told it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.condition._files import numbers, read_pictures
from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.types import Autoencoder, Batch, Cond, Draw, Widths


class Upscale(Condition):
    """A picture `scale` times smaller, noised -> its colours beside the latents, and how noisy it is as a vector.

    The noise is that of a `step` of DDPM's table (https://arxiv.org/abs/2006.11239, section 4), as it stands after `step` + 1 of
    its 1000 steps; the step's row of a learned table is the vector (noise conditioning, https://arxiv.org/abs/2106.15282, section
    4.2). In training steps 0 to `most` are drawn, and `low` is made from `image`; in requests `ask.step` is 20 if not said.

    Args:
        autoencoder: the model's, whose factor says how large the latents are.
        scale: how many times smaller the picture is, a side; it is brought to the latents' size.
        steps: rows of the table.
        most: the last step that is drawn in training.
        width: of the vector.
        rate: the share of samples for which both are dropped in training, in [0, 1]; 0 as published.
    """

    def __init__(
        self, autoencoder: Autoencoder, scale: int = 4, steps: int = 1000, most: int = 350, width: int = 1024, rate: float = 0.0
    ) -> None:
        super().__init__()
        self.factor, self.scale, self.most, self.rate = autoencoder.factor, scale, most, rate
        self.key, self.widths = ("low", "step", "low_noise"), Widths(spatial=3, vector=width)
        self.table = nn.Embedding(steps, width)

    def forward(self, value: Sequence[Tensor], drop: Tensor) -> Cond:
        """value: pictures (B, 3, h, w) in [-1, 1], steps (B) and noise (B, 3, h, w) -> spatial: (B, 3, H, W), vector: (B, D).

        Raises:
            Refusal: a step that the table does not have.
        """
        low, step, noise = value
        if not 0 <= int(step.min()) <= int(step.max()) < self.table.num_embeddings:
            raise Refusal(f"ask.step={step.tolist()}: noise steps are 0 to {self.table.num_embeddings - 1}.")
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
        alpha_bar = table[step.cpu()].to(low, non_blocking=True)
        noised = alpha_bar.sqrt()[:, None, None, None] * low + (1 - alpha_bar).sqrt()[:, None, None, None] * noise.to(low)
        size = [side * self.scale // self.factor for side in low.shape[2:]]
        noised = noised if size == list(low.shape[2:]) else interpolate(noised, size, mode="bicubic", antialias=True)
        heard = (~drop).to(noised, non_blocking=True)
        vector = self.table(step.to(self.table.weight.device, non_blocking=True))
        return Cond(spatial=noised * heard[:, None, None, None], vector=vector * heard[:, None].to(vector))

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Tensor]:
        """The small picture of `image`, where the batch has none, the step of its noise, and the noise."""
        made: dict[str, Tensor] = {}
        if "low" not in batch and "image" in batch:
            height, width = (side // self.scale for side in batch["image"].shape[2:])
            made["low"] = interpolate(batch["image"], (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
        low = made.get("low", batch.get("low"))
        if low is None:
            return made
        if "step" not in batch:
            drawn = None if draw is None else (draw.uniform("step") * (self.most + 1)).long()
            made["step"] = torch.full((len(low),), 20) if drawn is None else drawn
        if "low_noise" not in batch:
            same = torch.randn(low.shape[1:], generator=torch.Generator().manual_seed(0)).expand(low.shape)
            made["low_noise"] = same if draw is None else draw.normal("low", low.shape[1:])
        return made

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Files of small pictures -> (N, 3, height / scale, width / scale) in [-1, 1]; or steps -> (N) integers."""
        if field == "step":
            return numbers(field, values, 0, self.table.num_embeddings - 1).long()
        return read_pictures(field, values, (size[0] // self.scale, size[1] // self.scale))

    def input(self, field: str) -> Input | None:
        """A small picture, and the step of its noise."""
        step = Input("number", low=0, high=self.table.num_embeddings - 1, whole=True, usual=20)
        return {"low": Input("picture"), "step": step}.get(field)

    def show(self, value: Sequence[Tensor]) -> Tensor:
        """value: as in `forward` -> the small pictures."""
        return value[0]
