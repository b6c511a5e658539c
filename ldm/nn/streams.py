"""Two sequences, a picture's patches and a text's tokens, that attend to each other: MMDiT's blocks (2403.03206, figure 2).

Each has weights of its own, and is scaled, shifted and gated by the noise level and the vector.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ldm.nn.layers import zero
from ldm.nn.transformer import FeedForward, PlainNorm, RMSNorm, Turn, merge, split, turned


class Heads(nn.Module):
    """Queries, keys and values of one sequence, and where what was read comes back; without `out` nothing does."""

    def __init__(self, width: int, heads: int, norm_heads: bool, out: bool = True) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = (RMSNorm(width // heads) if norm_heads else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width) if out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> queries, keys and values (B, heads, N, D)."""
        q, k, v = split(self.qkv(x), 3, self.heads)
        return self.norm_q(q), self.norm_k(k), v


class Stream(nn.Module):
    """One of the two sequences in a block.

    `again` makes a second attention of the sequence to itself (Stable Diffusion 3.5 medium); `last` leaves all but queries, keys
    and values out, of a text that nothing reads any more.
    """

    def __init__(self, width: int, heads: int, norm_heads: bool, again: bool = False, last: bool = False) -> None:
        super().__init__()
        self.norm = PlainNorm(width)
        self.modulate = nn.Linear(width, (2 if last else 9 if again else 6) * width)
        self.attend = Heads(width, heads, norm_heads, not last)
        self.again = Heads(width, heads, norm_heads) if again else None
        self.feed = None if last else FeedForward(width)


class Joint(nn.Module):
    """A block of both: one attention over the patches and the tokens, then a feed-forward each."""

    def __init__(self, width: int, heads: int, norm_heads: bool, again: bool = False, last: bool = False) -> None:
        super().__init__()
        self.picture, self.text = Stream(width, heads, norm_heads, again), Stream(width, heads, norm_heads, last=last)

    def forward(self, x: Tensor, y: Tensor, told: Tensor, turn: Turn | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: (B, N, C), y: (B, L, C), told: (B, C), turn: (L + N, D) each, mask: (B, 1, 1, L + N) -> x, y."""
        of_text = self.text.modulate(told)[:, None].chunk(2 if self.text.feed is None else 6, dim=-1)
        of_picture = self.picture.modulate(told)[:, None].chunk(6 if self.picture.again is None else 9, dim=-1)
        plain = self.picture.norm(x)
        heads = [
            self.text.attend(moved(self.text.norm(y), *of_text[:2])),
            self.picture.attend(moved(plain, *of_picture[:2])),
        ]
        read = merge(attended(*(torch.cat(parts, dim=2) for parts in zip(*heads)), turn, mask))
        to_text, to_picture = read[:, : y.shape[1]], read[:, y.shape[1] :]
        x = x + of_picture[2] * self.picture.attend.out(to_picture)
        if self.picture.again is not None:
            shift, scale, gate = of_picture[6:]
            own = attended(*self.picture.again(moved(plain, shift, scale)), None, None)
            x = x + gate * self.picture.again.out(merge(own))
        x = x + of_picture[5] * self.picture.feed(moved(self.picture.norm(x), *of_picture[3:5]))
        if self.text.feed is not None:
            y = y + of_text[2] * self.text.attend.out(to_text)
            y = y + of_text[5] * self.text.feed(moved(self.text.norm(y), *of_text[3:5]))
        return x, y


def moved(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, C), scaled by 1 + scale and moved by shift, (B, 1, C) each."""
    return x * (1 + scale) + shift


def attended(q: Tensor, k: Tensor, v: Tensor, turn: Turn | None, mask: Tensor | None) -> Tensor:
    """(B, heads, N, D) each, mask: (B, 1, 1, N), True where it may be seen -> (B, heads, N, D)."""
    if turn is not None:
        q, k = turned(q, *turn), turned(k, *turn)
    return scaled_dot_product_attention(q, k, v, mask)


class LastLayer(nn.Module):
    """Patches -> their pixels, scaled and shifted by the noise level and the vector."""

    def __init__(self, width: int, outward: int) -> None:
        super().__init__()
        self.norm, self.modulate, self.out = PlainNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, outward)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x: (B, N, C), told: (B, C) -> (B, N, P)."""
        return self.out(moved(self.norm(x), *self.modulate(told)[:, None].chunk(2, dim=-1)))


def start(net: nn.Module) -> None:
    """Xavier's matrices, and every block the identity, as in DiT (https://arxiv.org/abs/2212.09748, section 3.2)."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            nn.init.zeros_(layer.bias)
        if name.endswith("modulate"):
            zero(layer)
    for i in (0, 2):
        nn.init.normal_(net.level[i].weight, std=0.02)
    zero(net.last)
