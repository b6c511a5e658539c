"""The U-Net of Latent Diffusion and Stable Diffusion (https://arxiv.org/abs/2112.10752, section 3.3 and appendix E).

Residual blocks told the noise level, transformer blocks that attend to the picture itself and then to the condition's
tokens. Encoder, middle and decoder stay apart, and `encoder[i]` is the i-th of CompVis' `input_blocks`, so that weights
travel and a ControlNet can borrow the first half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention, silu

from ldm.errors import Refusal
from ldm.nn.convolution import Convolution
from ldm.nn.layers import mlp, visible, zero
from ldm.nn.sinusoid import sinusoid
from ldm.nn.tell import ScaleShift, Shift
from ldm.types import Cond, Widths

Heard = tuple[Tensor, Tensor | None, Tensor | None]


class UNet(nn.Module):
    """x: (B, channels + widths.spatial, H, W), noise_level: (B), cond -> (B, channels, H, W); 2^(levels - 1) divides H and W.

    The defaults are Stable Diffusion 1's.

    Args:
        channels: of the latents, in and out.
        widths: of what the conditions say.
        width: features of the first level.
        mult: level i, at 1 / 2^i of the size, has width * mult[i] features.
        res_blocks: residual blocks of each level; the decoder has one more.
        depth: transformer blocks after each residual block of a level, or, where conditions bring no tokens, plain attention
            blocks (the paper's unconditional models); 0 for none.
        middle_depth: the same in the middle.
        heads: of attention, unless `head_width` is given.
        head_width: features of a head, of which there are then as many as fit.
        groups: of GroupNorm; they divide the features of every level.
        tokens_only: levels whose transformers attend to the tokens twice and never to the picture (the x4 upscaler).
        scale_shift: whether the noise level also scales the features of a residual block.
        res_resample: whether residual blocks resize, in the place of convolutions (LDM-8 of LSUN churches).
        vector: makes the way of the conditions' vector into the noise level's embedding, of 4 * width: an MLP (Stable Diffusion
            XL), or nothing where it has that width already.

    Raises:
        Refusal: `mult` and `depth` differ in length, or a width does not divide into heads.
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
        tokens_only: Sequence[int] = (),
        scale_shift: bool = False,
        res_resample: bool = False,
        vector: Callable[[int, int], nn.Module] = mlp,
    ) -> None:
        super().__init__()
        if len(mult) != len(depth):
            raise Refusal(f"backbone.mult has {len(mult)} levels, backbone.depth has {len(depth)}; give both the same number.")
        self.width, embedding = width, 4 * width
        self.level = mlp(width, embedding)
        self.vector = vector(widths.vector, embedding) if widths.vector else None
        make = Layers(embedding, groups, widths.tokens, heads, head_width, scale_shift, res_resample)

        def level(i: int, inward: int) -> list[nn.Module]:
            ch = mult[i] * width
            return [make.res(inward, ch), *make.attention(ch, depth[i], i in tokens_only)]

        ch, skips = width, [width]
        self.encoder = nn.ModuleList([Stage(nn.Conv2d(channels + widths.spatial, ch, 3, padding=1))])
        for i, m in enumerate(mult):
            for _ in range(res_blocks):
                self.encoder.append(Stage(*level(i, ch)))
                ch = m * width
                skips.append(ch)
            if i < len(mult) - 1:
                self.encoder.append(Stage(make.down(ch)))
                skips.append(ch)
        self.skips = tuple(skips)  # how wide what each stage of the encoder says is

        self.middle = Stage(make.res(ch, ch), *make.attention(ch, middle_depth), make.res(ch, ch))

        self.decoder = nn.ModuleList()
        for i, m in reversed(list(enumerate(mult))):
            for j in range(res_blocks + 1):
                layers, ch = level(i, ch + skips.pop()), m * width
                self.decoder.append(Stage(*layers, *([make.up(ch)] if i and j == res_blocks else [])))
        self.out = nn.Sequential(nn.GroupNorm(groups, ch), nn.SiLU(), zero(nn.Conv2d(ch, channels, 3, padding=1)))

    @property
    def blocks(self) -> list[nn.Module]:
        """What lies between the first layer and the last, in order: stages of the encoder, the middle's layers, the decoder's."""
        return [*self.encoder, *self.middle, *self.decoder]

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B) -> (B, C, H, W)."""
        heard = self.condition(x, noise_level, cond)
        return self.up(*self.down(x, heard), heard)

    def condition(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Heard:
        """What each stage hears: the noise level and the vector, (B, E), the tokens, (B, L, D), and their mask, (B, 1, 1, L)."""
        embedding = self.level(sinusoid(noise_level, self.width).to(x))
        embedding = silu(embedding if self.vector is None else embedding + self.vector(cond.vector.to(x)))
        return (embedding, None, None) if cond.tokens is None else (embedding, *visible(cond.tokens.to(x), cond.mask))

    def down(self, x: Tensor, heard: Heard) -> tuple[Tensor, list[Tensor]]:
        """Encoder and middle: x: (B, C + C', H, W) -> what the middle says, and what each stage of the encoder does."""
        h, skips = x, []
        for stage in self.encoder:
            h = stage(h, *heard)
            skips.append(h)
        return self.middle(h, *heard), skips

    def up(self, h: Tensor, skips: Sequence[Tensor], heard: Heard) -> Tensor:
        """Decoder: what `down` says -> (B, C, H, W)."""
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            h = stage(torch.cat((h, skip), dim=1), *heard)
        return self.out(h)


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one U-Net, alike on every level.

    Args:
        embedding: features of the noise level's embedding.
        groups: of GroupNorm.
        tokens: width of a token; 0 where there are none.
        heads, head_width, scale_shift, res_resample: as in `UNet`.
    """

    embedding: int
    groups: int
    tokens: int
    heads: int
    head_width: int | None
    scale_shift: bool
    res_resample: bool

    def res(self, inward: int, outward: int, resize: nn.Module | None = None) -> nn.Module:
        """A residual block."""
        tell = (ScaleShift if self.scale_shift else Shift)(outward, self.embedding, self.groups)
        return ResBlock(inward, outward, self.groups, tell, resize or nn.Identity())

    def attention(self, ch: int, depth: int, tokens_only: bool = False) -> list[nn.Module]:
        """Attention of a depth: one transformer of so many blocks, or, without tokens, so many plain blocks."""
        heads = self.heads if self.head_width is None else ch // self.head_width
        if depth and (not heads or ch % heads):
            raise Refusal(f"{ch} channels are not a whole number of heads (backbone.heads or backbone.head_width).")
        if not self.tokens:
            return [SelfAttention(ch, heads, self.groups) for _ in range(depth)]
        first = self.tokens if tokens_only else 0
        return [Transformer(ch, heads, first, self.tokens, depth, self.groups)] if depth else []

    def down(self, ch: int) -> nn.Module:
        """Halves height and width."""
        return self.res(ch, ch, nn.AvgPool2d(2)) if self.res_resample else Downsample(ch)

    def up(self, ch: int) -> nn.Module:
        """Doubles height and width."""
        return self.res(ch, ch, nn.Upsample(scale_factor=2.0)) if self.res_resample else Upsample(ch)


class Stage(nn.Sequential):
    """Layers one after another, each told what it listens to. No ModuleList: torch 2.10 and 2.11 shard none of these."""

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: (B, C, H, W), embedding: (B, E), tokens: (B, L, D), mask: (B, 1, 1, L) -> (B, C', H', W')."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, Transformer):
                x = layer(x, tokens, mask)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions around the noise level, beside a shortcut.

    Args:
        inward, outward: channels of the input and of the output.
        groups: of the first GroupNorm.
        tell: module that normalises the features and tells them the noise level.
        resize: what happens to the size, in both branches.
    """

    def __init__(self, inward: int, outward: int, groups: int, tell: nn.Module, resize: nn.Module) -> None:
        super().__init__()
        self.norm_in, self.conv_in = nn.GroupNorm(groups, inward), Convolution(inward, outward, 3, padding=1)
        self.resize, self.tell = resize, tell
        self.conv_out = zero(Convolution(outward, outward, 3, padding=1))
        self.skip = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, C, H, W), embedding: (B, E) -> (B, C', H', W')."""
        h = self.conv_in(self.resize(silu(self.norm_in(x))))
        return self.skip(self.resize(x)) + self.conv_out(silu(self.tell(h, embedding)))


class SelfAttention(nn.Module):
    """Each pixel attends to all: the attention of unconditional models. Each head's q, k and v lie together in `qkv`."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups, channels)
        self.qkv, self.proj_out = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.qkv(self.norm(x).flatten(2).transpose(1, 2))
        q, k, v = y.unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        y = self.proj_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + y.transpose(1, 2).reshape(x.shape)


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map.

    Args:
        channels: of the map.
        heads: of attention; they divide the channels.
        first: width of the tokens that the first attention reads; 0: it reads the picture.
        tokens: width of a token.
        depth: blocks.
        groups: of GroupNorm.
    """

    def __init__(self, channels: int, heads: int, first: int, tokens: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), zero(nn.Linear(channels, channels))
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, first, tokens) for _ in range(depth))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, C, H, W), tokens: (B, L, D), mask: (B, 1, 1, L) -> (B, C, H, W)."""
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            h = block(h, tokens, mask)
        return x + self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """Attention to the picture, or to tokens of width `first`; attention to the tokens; a gated feed-forward."""

    def __init__(self, channels: int, heads: int, first: int, tokens: int) -> None:
        super().__init__()
        self.first = first
        self.norm_self, self.attend_self = nn.LayerNorm(channels), Attention(channels, heads, first or channels)
        self.norm_tokens, self.attend_tokens = nn.LayerNorm(channels), Attention(channels, heads, tokens)
        self.norm_out, self.feed = nn.LayerNorm(channels), GEGLU(channels)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, N, C), tokens: (B, L, D), mask: (B, 1, 1, L) -> (B, N, C)."""
        y = self.norm_self(x)
        x = x + (self.attend_self(y, tokens, mask) if self.first else self.attend_self(y, y, None))
        x = x + self.attend_tokens(self.norm_tokens(x), tokens, mask)
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


class Downsample(Convolution):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(Convolution):
    """Doubles height and width by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return super().forward(interpolate(x, scale_factor=2.0, mode="nearest"))
