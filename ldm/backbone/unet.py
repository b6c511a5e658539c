"""The U-Net of Latent Diffusion and Stable Diffusion (https://arxiv.org/abs/2112.10752, section 3.3 and appendix E).

Residual blocks told the noise level, transformer blocks that attend to the picture itself and then to the condition's
tokens. Encoder, middle and decoder stay apart, and `encoder[i]` is the i-th of CompVis' `input_blocks`, so that weights
travel and a ControlNet can borrow the first half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention, silu

from ldm.nn.sinusoid import sinusoid
from ldm.types import Cond, Widths


class UNet(nn.Module):
    """x: (B, channels + widths.spatial, H, W), noise_level: (B), cond -> (B, channels, H, W).

    Level i works at 1 / 2^i of the size, with width * mult[i] channels, `res_blocks` residual blocks, each followed by
    depth[i] transformer blocks. Heads: `heads` of them, or channels / head_width where that is given. `groups` is
    GroupNorm's. The defaults are Stable Diffusion 1's.
    """

    def __init__(
        self,
        channels: int,
        widths: Widths,
        width: int = 320,
        mult: Sequence[int] = (1, 2, 4, 4),
        res_blocks: int = 2,
        depth: Sequence[int] = (1, 1, 1, 0),
        middle_depth: int = 1,
        heads: int = 8,
        head_width: int | None = None,
        groups: int = 32,
    ) -> None:
        super().__init__()
        if len(mult) != len(depth):
            raise ValueError(f"backbone.mult has {len(mult)} levels, backbone.depth has {len(depth)}; give both the same number.")
        self.width, told = width, 4 * width
        self.level = mlp(width, told)
        self.vector = mlp(widths.vector, told) if widths.vector else None

        def res(inward: int, outward: int) -> ResBlock:
            return ResBlock(inward, outward, told, groups)

        def attend(ch: int, blocks: int) -> list[nn.Module]:
            count = heads if head_width is None else ch // head_width
            return [Transformer(ch, count, widths.tokens or ch, blocks, groups)] if blocks else []

        ch, skips = width, [width]
        self.encoder = nn.ModuleList([Stage(nn.Conv2d(channels + widths.spatial, ch, 3, padding=1))])
        for i, m in enumerate(mult):
            for _ in range(res_blocks):
                self.encoder.append(Stage(res(ch, m * width), *attend(m * width, depth[i])))
                ch = m * width
                skips.append(ch)
            if i < len(mult) - 1:
                self.encoder.append(Stage(Downsample(ch)))
                skips.append(ch)

        self.middle = Stage(res(ch, ch), *attend(ch, middle_depth), res(ch, ch))

        self.decoder = nn.ModuleList()
        for i, m in reversed(list(enumerate(mult))):
            for j in range(res_blocks + 1):
                grow = [Upsample(m * width)] if i and j == res_blocks else []
                self.decoder.append(Stage(res(ch + skips.pop(), m * width), *attend(m * width, depth[i]), *grow))
                ch = m * width
        self.out = nn.Sequential(nn.GroupNorm(groups, ch), nn.SiLU(), zero(nn.Conv2d(ch, channels, 3, padding=1)))

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B) -> (B, C, H, W)."""
        told = self.level(sinusoid(noise_level, self.width).to(x))
        told = told if self.vector is None else told + self.vector(cond.vector.to(x))
        mask = None if cond.mask is None else cond.mask[:, None, None]
        h, skips = x, []
        for stage in self.encoder:
            h = stage(h, told, cond.tokens, mask)
            skips.append(h)
        h = self.middle(h, told, cond.tokens, mask)
        for stage in self.decoder:
            h = stage(torch.cat((h, skips.pop()), dim=1), told, cond.tokens, mask)
        return self.out(h)


class Stage(nn.ModuleList):
    """Layers one after another, each told what it listens to."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, told: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: (B, C, H, W), told: (B, E), tokens: (B, L, D), mask: (B, 1, 1, L) -> (B, C', H', W')."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, told)
            elif isinstance(layer, Transformer):
                x = layer(x, tokens, mask)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions around the noise level."""

    def __init__(self, inward: int, outward: int, told: int, groups: int) -> None:
        super().__init__()
        self.norm_in, self.conv_in = nn.GroupNorm(groups, inward), nn.Conv2d(inward, outward, 3, padding=1)
        self.told = nn.Linear(told, outward)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, outward), zero(nn.Conv2d(outward, outward, 3, padding=1))
        self.skip = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x: (B, C, H, W), told: (B, E) -> (B, C', H, W)."""
        h = self.conv_in(silu(self.norm_in(x))) + self.told(silu(told))[:, :, None, None]
        return self.skip(x) + self.conv_out(silu(self.norm_out(h)))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(self, channels: int, heads: int, tokens: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), zero(nn.Linear(channels, channels))
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, tokens) for _ in range(depth))

    def forward(self, x: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: (B, C, H, W), tokens: (B, L, D) or None: the pixels attend to themselves -> (B, C, H, W)."""
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            h = block(h, tokens, mask)
        return x + self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """Attention to the picture, attention to the tokens, a gated feed-forward."""

    def __init__(self, channels: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.norm_self, self.attend_self = nn.LayerNorm(channels), Attention(channels, heads, channels)
        self.norm_tokens, self.attend_tokens = nn.LayerNorm(channels), Attention(channels, heads, tokens)
        self.norm_out, self.feed = nn.LayerNorm(channels), GEGLU(channels)

    def forward(self, x: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: (B, N, C), tokens: (B, L, D) -> (B, N, C)."""
        y = self.norm_self(x)
        x = x + self.attend_self(y, y, None)
        y = self.norm_tokens(x)
        x = x + self.attend_tokens(y, y if tokens is None else tokens.to(y), mask)
        return x + self.feed(self.norm_out(x))


class Attention(nn.Module):
    """Multi-head attention; queries from one sequence, keys and values from another."""

    def __init__(self, channels: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.k, self.v = nn.Linear(tokens, channels, bias=False), nn.Linear(tokens, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, N, C), y: (B, L, D), mask: (B, 1, 1, L), True where y may be seen -> (B, N, C)."""
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (self.q(x), self.k(y), self.v(y)))
        return self.out(scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Feed-forward, four times as wide, half of it a gate (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        value, gate = self.wide(x).chunk(2, dim=-1)
        return self.out(value * gelu(gate))


class Downsample(nn.Conv2d):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Doubles height and width by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return super().forward(interpolate(x, scale_factor=2.0, mode="nearest"))


def mlp(inward: int, outward: int) -> nn.Sequential:
    """How a noise level or a vector enters: (B, inward) -> (B, outward)."""
    return nn.Sequential(nn.Linear(inward, outward), nn.SiLU(), nn.Linear(outward, outward))


def zero(layer: nn.Module) -> nn.Module:
    """The layer, with all its weights at zero: a residual branch that starts silent."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
