"""The Diffusion Transformer, DiT (https://arxiv.org/abs/2212.09748), and what SiT and LightningDiT made of it.

Patches are tokens; every block is scaled, shifted and gated by the noise level and the vector (adaLN-Zero).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from ldm.errors import Refusal
from ldm.nn.layers import identity, mlp, zero
from ldm.nn.sinusoid import sinusoid
from ldm.types import Cond, Widths


class DiT(nn.Module):
    """x: (B, channels + widths.spatial, H, W), noise_level: (B), cond -> (B, channels, H, W). It listens to vectors and maps.

    `depth` blocks of `width` features in `heads` heads over patches of `patch` x `patch` latents; `size`, latent height and
    width, is what the fixed positions are laid over. `vector` makes the way of a vector into the noise level's embedding.
    `learn_range` is for published DiT weights, which put out as many channels again, the range of the variance between its
    bounds (https://arxiv.org/abs/2102.09672, equation 15); they are computed and left. LightningDiT
    (https://arxiv.org/abs/2501.01423): `rms_norm` for LayerNorm, `swiglu` for the feed-forward, `rotary` positions in every
    attention beside the fixed ones, `norm_heads` for queries and keys of unit variance.
    The defaults are DiT-XL/2's for 256 x 256 pixels.

    Raises:
        Refusal: the heads or the patches do not divide what they should, or the conditions bring tokens.
    """

    def __init__(
        self,
        channels: int,
        widths: Widths,
        size: int = 32,
        patch: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        vector: Callable[[int, int], nn.Module] = identity,
        learn_range: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
        rotary: bool = False,
        norm_heads: bool = False,
    ) -> None:
        super().__init__()
        if widths.tokens:
            raise Refusal("backbone=dit listens to vectors and maps, not to tokens (condition.label.slot=vector).")
        if width % heads or size % patch or width % 4 or (rotary and width // heads % 4):
            raise Refusal(
                f"backbone: width={width} must divide into heads={heads} (with rotary, of a multiple of 4), size={size} into "
                f"patches of {patch}."
            )
        self.channels, self.patch = channels, patch
        norm = RMSNorm if rms_norm else PlainNorm
        self.embed = nn.Conv2d(channels + widths.spatial, width, patch, stride=patch)
        self.level = mlp(256, width)
        self.vector = vector(widths.vector, width) if widths.vector else None
        self.register_buffer("position", grid_waves(size // patch, width))
        self.head_width = width // heads if rotary else 0
        self.blocks = nn.ModuleList(Block(width, heads, norm, swiglu, norm_heads) for _ in range(depth))
        self.last = Last(width, patch * patch * channels * (2 if learn_range else 1), norm)
        self.start()

    def start(self) -> None:
        """Xavier's matrices, and every block the identity (adaLN-Zero); the paper's section 3.2."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.embed.weight.view(self.embed.weight.shape[0], -1))
        nn.init.zeros_(self.embed.bias)
        for i in (0, 2):
            nn.init.normal_(self.level[i].weight, std=0.02)
        for block in self.blocks:
            zero(block.modulate)
        zero(self.last)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B) -> (B, C, H, W).

        Raises:
            Refusal: the latents have another size than the fixed positions.
        """
        told = self.level(sinusoid(noise_level, 256).to(x))
        told = silu(told if self.vector is None else told + self.vector(cond.vector.to(x)))
        h = self.embed(x)
        rows, columns = h.shape[2:]
        if rows * columns != len(self.position):
            side = self.patch * math.isqrt(len(self.position))
            raise Refusal(
                f"The latents are {x.shape[2]}x{x.shape[3]}; this backbone's positions are for {side}x{side} (backbone.size)."
            )
        h = h.flatten(2).transpose(1, 2) + self.position
        turn = rotation(rows, columns, self.head_width, h) if self.head_width else None
        for block in self.blocks:
            h = block(h, told, turn)
        h = self.last(h, told).unflatten(1, (rows, columns)).unflatten(-1, (self.patch, self.patch, -1))
        return h[..., : self.channels].permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class Block(nn.Module):
    """Attention and a feed-forward; each is told shift, scale and gate."""

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module], swiglu: bool, norm_heads: bool) -> None:
        super().__init__()
        self.norm_in, self.attend = norm(width), Attention(width, heads, norm_heads)
        self.norm_out, self.feed = norm(width), SwiGLU(width) if swiglu else FeedForward(width)
        self.modulate = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, told: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: (B, N, C), told: (B, C) -> (B, N, C)."""
        shift_in, scale_in, gate_in, shift_out, scale_out, gate_out = self.modulate(told)[:, None].chunk(6, dim=-1)
        x = x + gate_in * self.attend(self.norm_in(x) * (1 + scale_in) + shift_in, turn)
        return x + gate_out * self.feed(self.norm_out(x) * (1 + scale_out) + shift_out)


class Last(nn.Module):
    """Tokens -> the pixels of their patches."""

    def __init__(self, width: int, outward: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.modulate, self.out = norm(width), nn.Linear(width, 2 * width), nn.Linear(width, outward)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x: (B, N, C), told: (B, C) -> (B, N, P)."""
        shift, scale = self.modulate(told)[:, None].chunk(2, dim=-1)
        return self.out(self.norm(x) * (1 + scale) + shift)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int, norm_heads: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = (RMSNorm(width // heads) if norm_heads else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q), self.norm_k(k)
        if turn is not None:
            q, k = turned(q, *turn), turned(k, *turn)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Four times as wide, GELU by its tanh formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.out(gelu(self.wide(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated by SiLU (https://arxiv.org/abs/2002.05202), two thirds as wide, so that it has as many weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(2 / 3 * 4 * width)
        self.wide, self.out = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        gate, value = self.wide(x).chunk(2, dim=-1)
        return self.out(silu(gate) * value)


class PlainNorm(nn.LayerNorm):
    """LayerNorm that leaves scale and shift to the block."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)


class RMSNorm(nn.RMSNorm):
    """Divides by the root mean square (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


def grid_waves(side: int, width: int) -> Tensor:
    """-> (side * side, width): of each place, sines and cosines of its column, then of its row, half the width each."""
    freqs = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64),) * 2, indexing="ij")
    angles = [place.flatten()[:, None] * freqs for place in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def rotation(rows: int, columns: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (rows * columns, width) of rotary positions in two dimensions, half the width each (2104.09864)."""
    freqs = 10_000 ** -(torch.arange(width // 4, device=like.device) / (width // 4))
    place = torch.meshgrid(torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij")
    angle = torch.cat([p.flatten()[:, None] * freqs for p in place], dim=1).repeat_interleave(2, dim=1)
    return angle.cos().to(like), angle.sin().to(like)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, heads, N, D), its neighbouring pairs of features turned by their place's angles."""
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-right, left), dim=-1).flatten(-2) * sin
