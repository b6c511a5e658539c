"""MMDiT's blocks: a picture's patches x and a text's tokens y attend to each other (https://arxiv.org/abs/2403.03206, figure 2).

a_x, a_y = attention over both sequences of  q, k, v of (1 + scale) norm(x) + shift  and of the same of y
x <- x + gate a_x;  x <- x + gate' feed((1 + scale') norm(x) + shift');  the same of y

Each sequence has its own weights. Scales, shifts and gates are linear in the embedding of noise level and vector.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ldm.nn.layers import zero
from ldm.nn.transformer import FeedForward, PlainNorm, RMSNorm, Turn, apply_rotary, merge, split


class Heads(nn.Module):
    """The projections of one sequence in joint attention: to queries, keys and values, and, unless `out` is false, back.

    `norm_heads` normalises queries and keys by their root mean square.
    """

    def __init__(self, width: int, heads: int, norm_heads: bool, out: bool = True) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = (RMSNorm(width // heads) if norm_heads else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width) if out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> queries, keys and values (B, heads, N, D)."""
        return split(self.qkv(x), 3, self.heads, self.norm_q, self.norm_k)


class Stream(nn.Module):
    """The layers of one of the two sequences in a block.

    Args:
        width: features of a token, C.
        heads: of attention; they divide the width.
        norm_heads: whether queries and keys are normalised by their root mean square.
        again: whether there is a second attention, of the sequence to itself (Stable Diffusion 3.5 medium).
        last: whether there are queries, keys and values alone, as for a text that no later layer reads.
    """

    def __init__(self, width: int, heads: int, norm_heads: bool, again: bool = False, last: bool = False) -> None:
        super().__init__()
        self.norm = PlainNorm(width)
        self.modulate = nn.Linear(width, (2 if last else 9 if again else 6) * width)
        self.attend = Heads(width, heads, norm_heads, not last)
        self.again = Heads(width, heads, norm_heads) if again else None
        self.feed = None if last else FeedForward(width)


class Joint(nn.Module):
    """A block of both sequences: joint attention, then a feed-forward each.

    Args:
        width: features of a token, C.
        heads: of attention; they divide the width.
        norm_heads: whether queries and keys are normalised by their root mean square.
        again: whether the picture has a second attention, to itself.
        last: whether the text ends here, and comes out as it went in.
    """

    def __init__(self, width: int, heads: int, norm_heads: bool, again: bool = False, last: bool = False) -> None:
        super().__init__()
        self.picture, self.text = Stream(width, heads, norm_heads, again), Stream(width, heads, norm_heads, last=last)

    def forward(self, x: Tensor, y: Tensor, embedding: Tensor, turn: Turn | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> x and y after the block, shaped as before.

        Args:
            x: (B, N, C), patches.
            y: (B, L, C), tokens.
            embedding: (B, C), of the noise level and the vector.
            turn: cosines and sines of rotary positions, (L + N, D) each, of tokens, then patches.
            mask: (B, 1, 1, L + N) bool, True where a token or patch may be attended to.
        """
        of_text = self.text.modulate(embedding)[:, None].chunk(2 if self.text.feed is None else 6, dim=-1)
        of_picture = self.picture.modulate(embedding)[:, None].chunk(6 if self.picture.again is None else 9, dim=-1)
        plain = self.picture.norm(x)
        heads = [
            self.text.attend(modulated(self.text.norm(y), *of_text[:2])),
            self.picture.attend(modulated(plain, *of_picture[:2])),
        ]
        read = merge(attention(*(torch.cat(parts, dim=2) for parts in zip(*heads)), turn, mask))
        to_text, to_picture = read[:, : y.shape[1]], read[:, y.shape[1] :]
        x = torch.addcmul(x, of_picture[2], self.picture.attend.out(to_picture))
        if self.picture.again is not None:
            shift, scale, gate = of_picture[6:]
            second = attention(*self.picture.again(modulated(plain, shift, scale)), None, None)
            x = torch.addcmul(x, gate, self.picture.again.out(merge(second)))
        x = torch.addcmul(x, of_picture[5], self.picture.feed(modulated(self.picture.norm(x), *of_picture[3:5])))
        if self.text.feed is not None:
            y = torch.addcmul(y, of_text[2], self.text.attend.out(to_text))
            y = torch.addcmul(y, of_text[5], self.text.feed(modulated(self.text.norm(y), *of_text[3:5])))
        return x, y


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (B, N, C), shift and scale: (B, 1, C) -> (1 + scale) x + shift (adaLN, https://arxiv.org/abs/2212.09748)."""
    return torch.addcmul(shift, x, 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor, turn: Turn | None, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention -> (B, heads, N, D).

    Args:
        q, k, v: (B, heads, N, D).
        turn: cosines and sines of rotary positions, (N, D) each; None for no positions.
        mask: (B, 1, 1, N) bool, True where a token may be attended to; None where all may.
    """
    if turn is not None:
        q, k = apply_rotary(q, *turn), apply_rotary(k, *turn)
    return scaled_dot_product_attention(q, k, v, mask)


class LastLayer(nn.Module):
    """The final layer: normalised patches, scaled and shifted by the embedding, -> the numbers of their latents."""

    def __init__(self, width: int, outward: int) -> None:
        super().__init__()
        self.norm, self.modulate, self.out = PlainNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, outward)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, N, C), embedding: (B, C) -> (B, N, P)."""
        return self.out(modulated(self.norm(x), *self.modulate(embedding)[:, None].chunk(2, dim=-1)))


def initialize(net: nn.Module) -> None:
    """Initialises a transformer in place: Xavier-uniform matrices, zero biases, and every block the identity, as in DiT
    (adaLN-Zero, https://arxiv.org/abs/2212.09748, section 3.2).
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            nn.init.zeros_(layer.bias)
        if name.endswith("modulate"):
            zero(layer)
    for i in (0, 2):
        nn.init.normal_(net.level[i].weight, std=0.02)
    zero(net.last)
