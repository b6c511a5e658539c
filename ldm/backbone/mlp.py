"""A small residual MLP over flattened latents, for toys and tests."""

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Cond, Widths


class MLP(nn.Module):
    """x: (B, channels + widths.spatial, size, size) -> (B, channels, size, size); tokens are averaged into the vector.

    Args:
        channels: of the latents, in and out.
        widths: of what the conditions say.
        size: height and width of the latents; others are refused.
        width, depth: features, and residual blocks.
    """

    def __init__(self, channels: int, widths: Widths, size: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.exp(torch.linspace(-7, 1, width // 2)))
        self.inp = nn.Linear((channels + widths.spatial) * size * size, width)
        self.out = nn.Linear(width, channels * size * size)
        self.time = nn.Linear(width, width)
        self.vector = nn.Linear(widths.vector, width) if widths.vector else None
        self.tokens = nn.Linear(widths.tokens, width) if widths.tokens else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.shape = (channels, size, size)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B), cond -> (B, C, H, W).

        Raises:
            Refusal: latents of another size.
        """
        if x.shape[2:] != self.shape[1:]:
            raise Refusal(
                f"The latents are {x.shape[2]}x{x.shape[3]}, and this backbone=mlp is for {self.shape[1]}x{self.shape[2]} alone: "
                f"say backbone.size={x.shape[2]}, data.size through the autoencoder's factor (square pictures, no buckets)."
            )
        angle = noise_level[:, None] * self.freqs
        embedding = self.time(torch.cat((angle.cos(), angle.sin()), dim=1))
        embedding = embedding if self.vector is None else embedding + self.vector(cond.vector)
        if self.tokens is not None:
            weight = 1.0 if cond.mask is None else cond.mask[..., None].float()
            embedding = embedding + self.tokens((cond.tokens * weight).sum(1) / (torch.ones_like(cond.tokens) * weight).sum(1))
        h = self.inp(x.flatten(1))
        for block in self.blocks:
            h = h + block(h + embedding)
        return self.out(h).unflatten(1, self.shape)
