"""Layers of transformers over patches: norms, feed-forwards, attention, and positions.

Attention     softmax(q k^T / sqrt(D)) v, for each head of width D (https://arxiv.org/abs/1706.03762, equation 1)
SwiGLU        W3 (silu(W1 x) * W2 x) (https://arxiv.org/abs/2002.05202, equation 6)
Sinusoids     sin(w_i p), cos(w_i p), w_i = 10000^(-4 i / width), half the features for each of column and row
Rotary        pairs of features (a, b) -> (a cos(w_i p) - b sin(w_i p), a sin(w_i p) + b cos(w_i p))
              (https://arxiv.org/abs/2104.09864, equation 34)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

Turn = tuple[Tensor, Tensor]  # cosines and sines of rotary positions, (N, D) each


class PlainNorm(nn.LayerNorm):
    """LayerNorm without weights of its own: scale and shift come from the block."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)


class RMSNorm(nn.RMSNorm):
    """Divides by the root mean square, with a learnt scale (https://arxiv.org/abs/1910.07467, equation 4)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class FeedForward(nn.Module):
    """Two linear layers around a GELU (its tanh approximation), four times as wide in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.out(gelu(self.wide(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """A feed-forward gated by SiLU, two thirds as wide as `FeedForward`, so that it has as many weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(2 / 3 * 4 * width)
        self.wide, self.out = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        gate, value = self.wide(x).chunk(2, dim=-1)
        return self.out(silu(gate) * value)


class Attention(nn.Module):
    """Multi-head self-attention; `norm_heads` normalises queries and keys by their root mean square."""

    def __init__(self, width: int, heads: int, norm_heads: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = (RMSNorm(width // heads) if norm_heads else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, turn: Turn | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, C), turn: rotary positions, mask: (B, 1, 1, N) bool, True where x may be attended to -> (B, N, C)."""
        q, k, v = split(self.qkv(x), 3, self.heads, self.norm_q, self.norm_k)
        if turn is not None:
            q, k = apply_rotary(q, *turn), apply_rotary(k, *turn)
        return self.out(merge(scaled_dot_product_attention(q, k, v, mask)))


class CrossAttention(nn.Module):
    """Multi-head cross-attention of patches to tokens (PixArt, https://arxiv.org/abs/2310.00426, section 2.3)."""

    def __init__(self, width: int, heads: int, norm_heads: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = (RMSNorm(width // heads) if norm_heads else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, N, C), tokens: (B, L, C), mask: (B, 1, 1, L) bool, True where they may be attended to -> (B, N, C)."""
        (q,), (k, v) = split(self.q(x), 1, self.heads, self.norm_q), split(self.kv(tokens), 2, self.heads, self.norm_k)
        return self.out(merge(scaled_dot_product_attention(q, k, v, mask)))


def split(x: Tensor, parts: int, heads: int, *norms: nn.Module) -> tuple[Tensor, ...]:
    """(B, N, parts * C) -> the parts, such as queries, keys and values, by head: (B, heads, N, C / heads) each.

    `norms` are those of the first parts, which come before the heads change places with the tokens: so whole tokens are read.
    """
    each = x.unflatten(-1, (parts, heads, -1)).unbind(2)
    return tuple((norms[i](part) if i < len(norms) else part).transpose(1, 2) for i, part in enumerate(each))


def merge(x: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, N, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def sinusoidal_positions(rows: int, columns: int, width: int, span: tuple[float, float] | None = None) -> Tensor:
    """-> (rows * columns, width): the sinusoidal positions of a grid, row by row, of each place's column, then of its row.

    Rows and columns are counted from 0; with `span` they are scaled to so many rows and columns, whatever their number is.
    """
    freqs = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = []
    for count, over in zip((columns, rows), (span or (rows, columns))[::-1]):
        angle = (torch.arange(count, dtype=torch.float32) / (count / over)).double()[:, None] * freqs
        waves.append(torch.cat((angle.sin(), angle.cos()), dim=1).float())
    across, down = waves[0].expand(rows, -1, -1), waves[1][:, None].expand(-1, columns, -1)
    return torch.cat((across, down), dim=2).flatten(0, 1)


def rotation(rows: int, columns: int, width: int, like: Tensor) -> Turn:
    """-> cosines and sines, (rows * columns, width) each, of rotary positions on a grid, half the width for each dimension."""
    freqs = 10_000 ** -(torch.arange(width // 4, device=like.device) / (width // 4))
    place = torch.meshgrid(torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij")
    angle = torch.cat([p.flatten()[:, None] * freqs for p in place], dim=1).repeat_interleave(2, dim=1)
    return angle.cos().to(like), angle.sin().to(like)


def rotary(places: Tensor, widths: Sequence[int], like: Tensor) -> Turn:
    """places: (N, A) integers -> cosines and sines, (N, sum of widths) each, of rotary positions in A dimensions."""
    axes = []
    for place, width in zip(places.T, widths, strict=True):
        axes.append(torch.outer(place.double(), 1 / 10_000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)))
    angle = torch.cat(axes, dim=1).repeat_interleave(2, dim=1)
    return angle.cos().float().to(like), angle.sin().float().to(like)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, heads, N, D), cos and sin: (N, D) -> x with its neighbouring pairs of features rotated by their place's angles."""
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype == cos.dtype and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        turn = torch.complex(cos[..., ::2], sin[..., ::2])  # one pass over x in the place of five
        return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    left, right = pairs.unbind(-1)
    return x * cos + torch.stack((-right, left), dim=-1).flatten(-2) * sin
