"""Flux' backbone, of which no paper tells: as diffusers' FluxTransformer2DModel computes it (58eb52c, transformer_flux.py).

First blocks in which patches and tokens have weights of their own, as in MMDiT; then blocks in which they are one sequence.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pixel_shuffle, pixel_unshuffle, silu

from ldm.errors import Refusal
from ldm.nn.layers import mlp, visible
from ldm.nn.sinusoid import sinusoid
from ldm.nn.streams import Joint, LastLayer, attention, initialize, modulated
from ldm.nn.transformer import PlainNorm, RMSNorm, Turn, merge, rotary, split
from ldm.types import Cond, Widths


class Flux(nn.Module):
    """x: (B, channels + widths.spatial, H, W), noise_level: (B), cond -> (B, channels, H, W); `patch` divides H and W.

    The defaults are schnell's; dev's has `guided`: 11,901,408,320 parameters with tokens of 4096 and a vector of 768 (and 256).

    Args:
        channels: of the latents, in and out.
        widths: of what the conditions say.
        patch: latents of `patch` x `patch` are one token.
        width, heads: features of a token, and heads of attention in each block.
        depth, single: blocks of two sequences, and of one.
        axes: features of a head that are turned by a place's number (0 for all), its row and its column; together a head's.
        guided: the last 256 numbers of the conditions' vector are the waves of 1,000 times a guidance scale, and go in by a layer
            of their own (dev).

    Raises:
        Refusal: the heads do not divide the width, the axes are not a head's, or the conditions bring no tokens or vector.
    """

    def __init__(
        self,
        channels: int,
        widths: Widths,
        patch: int = 2,
        width: int = 3072,
        depth: int = 19,
        single: int = 38,
        heads: int = 24,
        axes: tuple[int, int, int] = (16, 56, 56),
        guided: bool = False,
    ) -> None:
        super().__init__()
        if width % heads or sum(axes) != width // heads or any(n % 2 for n in axes):
            raise Refusal(
                f"backbone: width={width} must divide into heads={heads}, and axes={list(axes)}, even numbers, add up to one "
                "head's features."
            )
        if not widths.tokens or widths.vector <= 256 * guided:
            raise Refusal(
                "backbone=flux reads tokens and a vector, of which guidance is the last 256 numbers where backbone.guided=true; "
                f"the conditions bring {widths} (condition=[text,language,guidance])."
            )
        self.patch, self.axes, self.guided = patch, tuple(axes), guided
        self.embed = nn.Linear((channels + widths.spatial) * patch * patch, width)
        self.level, self.read = mlp(256, width), nn.Linear(widths.tokens, width)
        self.vector = mlp(widths.vector - 256 * guided, width)
        self.guidance = mlp(256, width) if guided else None
        double = [Joint(width, heads, norm_heads=True) for _ in range(depth)]
        self.blocks = nn.ModuleList([*double, *(Single(width, heads) for _ in range(single))])
        self.last = LastLayer(width, patch * patch * channels)
        initialize(self)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B) -> (B, C, H, W).

        Raises:
            Refusal: the patches do not divide the latents.
        """
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise Refusal(
                f"The latents are {x.shape[2]}x{x.shape[3]}, which patches of {self.patch} do not divide (backbone.patch, and "
                "data.size or resolution=)."
            )
        embedding, vector = self.level(sinusoid(noise_level, 256).to(x)), cond.vector.to(x)
        if self.guidance is not None:
            embedding, vector = embedding + self.guidance(vector[:, -256:]), vector[:, :-256]
        embedding = silu(embedding + self.vector(vector))
        tokens, mask = visible(cond.tokens.to(x), cond.mask)
        h = pixel_unshuffle(x, self.patch)
        rows, columns = h.shape[2:]
        h, y = self.embed(h.flatten(2).transpose(1, 2)).to(x), self.read(tokens).to(x)  # under autocast sums stay float32
        turn = rotary(places(y.shape[1], rows, columns), self.axes, h)
        mask = None if mask is None else torch.cat((mask, mask.new_ones(len(h), 1, 1, h.shape[1])), dim=3)
        for block in self.blocks:
            h, y = block(h, y, embedding, turn, mask)
        h = self.last(h, embedding).transpose(1, 2).unflatten(2, (rows, columns))
        return pixel_shuffle(h, self.patch)


class Single(nn.Module):
    """Attention and a feed-forward side by side, over tokens and patches in one sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width, self.norm = heads, width, PlainNorm(width)
        self.modulate = nn.Linear(width, 3 * width)
        self.into, self.out = nn.Linear(width, 7 * width), nn.Linear(5 * width, width)
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor, y: Tensor, embedding: Tensor, turn: Turn, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> patches and tokens, as they came.

        Args:
            x, y: (B, N, C) patches, and (B, L, C) tokens.
            embedding: (B, C), the noise level and the vector.
            turn: cosines and sines of the places of tokens and patches, (L + N, D) each.
            mask: (B, 1, 1, L + N), True where attention reads; None: everywhere.
        """
        both, length = torch.cat((y, x), dim=1), y.shape[1]
        shift, scale, gate = self.modulate(embedding)[:, None].chunk(3, dim=-1)
        heads, wide = self.into(modulated(self.norm(both), shift, scale)).split((3 * self.width, 4 * self.width), dim=-1)
        q, k, v = split(heads, 3, self.heads, self.norm_q, self.norm_k)
        read = merge(attention(q, k, v, turn, mask))
        both = torch.addcmul(both, gate, self.out(torch.cat((read, gelu(wide, approximate="tanh")), dim=-1)))
        return both[:, length:], both[:, :length]


def places(tokens: int, rows: int, columns: int) -> Tensor:
    """-> (tokens + rows * columns, 3): zeros for a token; zero, its row and its column for a patch."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    patches = torch.stack((torch.zeros_like(row), row, column), dim=-1).flatten(0, 1)
    return torch.cat((patches.new_zeros(tokens, 3), patches))
