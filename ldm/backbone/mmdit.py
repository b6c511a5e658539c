"""MMDiT, the backbone of Stable Diffusion 3 (https://arxiv.org/abs/2403.03206, section 4) and 3.5.

Patches and tokens are two sequences with weights of their own, that attend to each other in every block.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ldm.errors import Refusal
from ldm.nn.layers import mlp, visible
from ldm.nn.sinusoid import sinusoid
from ldm.nn.streams import Joint, LastLayer, initialize
from ldm.nn.transformer import sinusoidal_positions
from ldm.types import Cond, Widths


class MMDiT(nn.Module):
    """x: (B, channels + widths.spatial, H, W), noise_level: (B), cond -> (B, channels, H, W).

    The defaults are Stable Diffusion 3 medium's, 2,028,328,000 parameters with a text of 4096 and a vector of 2048.

    Args:
        channels: of the latents, in and out.
        widths: of what the conditions say.
        size: latent height and width over which positions are as far apart as patches, one each.
        most: rows and columns of patches at most. Positions are a square of so many, laid over `size`, of which a smaller
            picture takes the middle.
        patch: latents of `patch` x `patch` are one token.
        width, depth, heads: features of a token, blocks, and heads of attention in each.
        again: of the first so many blocks the patches attend to each other a second time (Stable Diffusion 3.5 medium: 13).
        norm_heads: queries and keys of unit variance (Stable Diffusion 3.5).
        vector: makes the way of the conditions' vector into the noise level's embedding.

    Raises:
        Refusal: the heads or the patches do not divide what they should, or the conditions bring no tokens.
    """

    def __init__(
        self,
        channels: int,
        widths: Widths,
        size: int = 128,
        most: int = 192,
        patch: int = 2,
        width: int = 1536,
        depth: int = 24,
        heads: int = 24,
        again: int = 0,
        norm_heads: bool = False,
        vector: Callable[[int, int], nn.Module] = mlp,
    ) -> None:
        super().__init__()
        if width % heads or size % patch or width % 4:
            raise Refusal(
                f"backbone: width={width} must divide into heads={heads} and by 4, and size={size} into patches of {patch}."
            )
        if not widths.tokens:
            raise Refusal("backbone=mmdit reads tokens beside the picture, and no condition brings any (condition=[text]).")
        self.channels, self.patch, self.most = channels, patch, most
        self.embed = nn.Conv2d(channels + widths.spatial, width, patch, stride=patch)
        self.level = mlp(256, width)
        self.vector = vector(widths.vector, width) if widths.vector else None
        self.read = nn.Linear(widths.tokens, width)
        self.register_buffer("position", sinusoidal_positions(most, most, width, (size // patch, size // patch)))
        self.blocks = nn.ModuleList(Joint(width, heads, norm_heads, i < again, i == depth - 1) for i in range(depth))
        self.last = LastLayer(width, patch * patch * channels)
        initialize(self)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B) -> (B, C, H, W).

        Raises:
            Refusal: the patches do not divide the latents, or are more than have a position.
        """
        level = self.level(sinusoid(noise_level, 256).to(x))
        embedding = silu(level if self.vector is None else level + self.vector(cond.vector.to(x)))
        tokens, mask = visible(cond.tokens.to(x), cond.mask)
        place, rows, columns = self.places(x)
        h = self.embed(x).flatten(2).transpose(1, 2).contiguous() + place  # as the sums of all blocks lie from here on
        y = self.read(tokens).to(x)  # under autocast sums stay float32
        mask = None if mask is None else torch.cat((mask, mask.new_ones(len(h), 1, 1, h.shape[1])), dim=3)
        for block in self.blocks:
            h, y = block(h, y, embedding, None, mask)
        h = self.last(h, embedding).unflatten(1, (rows, columns)).unflatten(-1, (self.patch, self.patch, -1))
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])

    def places(self, x: Tensor) -> tuple[Tensor, int, int]:
        """x: (B, C, H, W) -> positions of its patches (N, width), and how many rows and columns there are."""
        (rows, over), (columns, beside) = divmod(x.shape[2], self.patch), divmod(x.shape[3], self.patch)
        if over or beside or max(rows, columns) > self.most:
            raise Refusal(
                f"The latents are {x.shape[2]}x{x.shape[3]}; patches of {self.patch} must divide them, and there are positions "
                f"for {self.most * self.patch}x{self.most * self.patch} at most (backbone.patch, backbone.most, and data.size or "
                "resolution=)."
            )
        top, left = (self.most - rows) // 2, (self.most - columns) // 2
        place = self.position.unflatten(0, (self.most, self.most))[top : top + rows, left : left + columns]
        return place.flatten(0, 1), rows, columns
