"""The Diffusion Transformer, DiT (https://arxiv.org/abs/2212.09748), and what SiT, LightningDiT and PixArt made of it.

Patches are tokens; every block is scaled, shifted and gated by the noise level and the vector (adaLN-Zero).
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from ldm.errors import Refusal
from ldm.nn.layers import identity, mlp, visible, zero
from ldm.nn.route import Route, come_back, leave
from ldm.nn.sinusoid import sinusoid
from ldm.nn.streams import modulated
from ldm.nn.transformer import (
    Attention,
    CrossAttention,
    FeedForward,
    PlainNorm,
    RMSNorm,
    SwiGLU,
    Turn,
    rotation,
    sinusoidal_positions,
)
from ldm.types import Cond, Widths


class DiT(nn.Module):
    """x: (B, channels + widths.spatial, H, W), noise_level: (B), cond -> (B, channels, H, W); `patch` divides H and W.

    The defaults are DiT-XL/2's for 256 x 256 pixels.

    Args:
        channels: of the latents, in and out.
        widths: of what the conditions say.
        size: latent height and width that the fixed positions are laid over; at other sizes they are laid over as much, closer
            or wider apart, rows and columns each by itself (as PixArt's are, https://arxiv.org/abs/2310.00426).
        patch: latents of `patch` x `patch` are one token.
        width, depth, heads: features of a token, blocks, and heads of attention in each.
        vector: makes the way of the conditions' vector into the noise level's embedding.
        learn_range: for published DiT weights, which put out as many channels again, the range of the variance between its
            bounds (https://arxiv.org/abs/2102.09672, equation 15); they are computed and left.
        rms_norm, swiglu: for LayerNorm and the feed-forward (LightningDiT, https://arxiv.org/abs/2501.01423).
        rotary: positions in two dimensions in every attention among patches.
        norm_heads: queries and keys of unit variance.
        fixed: whether the fixed positions are added to the patches; without them the rotary ones are the only ones.
        tokens: how the conditions' tokens are read, where there are any: `cross`, each block attends to them (PixArt,
            https://arxiv.org/abs/2310.00426, section 2.3), or `joint`, they stand beside the patches and go through all blocks.
        shared: one layer makes the scales, shifts and gates of all blocks, to which each adds its own table (adaLN-single,
            the same section).
        registers: learnt tokens beside the patches, that mean nothing (https://arxiv.org/abs/2309.16588).
        fuse: two blocks, 1 the first: what enters the one and what leaves the other are joined by a layer, so that the blocks
            between may see few patches in training (SPRINT, https://arxiv.org/abs/2510.21986); a token stands for the others.
        head: width, blocks and heads of attention of a wider head behind the blocks (DiT^DH, https://arxiv.org/abs/2510.11690,
            section 5), for latents of many channels: it reads the noisy latents anew, and each patch's scales, shifts and gates
            are made of what the blocks say of it and the noise level. Without one, the last layer reads the blocks.

    Raises:
        Refusal: the heads or the patches do not divide what they should, or nothing says where a patch lies.
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
        fixed: bool = True,
        tokens: Literal["cross", "joint"] = "cross",
        shared: bool = False,
        registers: int = 0,
        fuse: Sequence[int] | None = None,
        head: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_head(head, rotary)
        if width % heads or size % patch or width % 4 or (rotary and width // heads % 4):
            raise Refusal(
                f"backbone: width={width} must divide into heads={heads} (with rotary, of a multiple of 4), size={size} into "
                f"patches of {patch}."
            )
        if not (fixed or rotary):
            raise Refusal("backbone.fixed=false leaves a patch without a position; use backbone.rotary=true with it.")
        if tokens not in ("cross", "joint"):
            raise Refusal(f"backbone.tokens={tokens}: cross or joint was wanted.")
        if fuse is not None and not (len(fuse) == 2 and 1 <= fuse[0] <= fuse[1] <= depth):
            raise Refusal(f"backbone.fuse={list(fuse)}: wanted two of the {depth} blocks, 1 to {depth}, in their order.")
        self.channels, self.patch, self.side, self.fixed = channels, patch, size // patch, fixed
        self.joint = tokens == "joint"
        norm, across = RMSNorm if rms_norm else PlainNorm, widths.tokens > 0 and not self.joint
        self.embed = nn.Conv2d(channels + widths.spatial, width, patch, stride=patch)
        self.level = mlp(256, width)
        self.vector = vector(widths.vector, width) if widths.vector else None
        self.read = Caption(widths.tokens, width) if widths.tokens else None
        self.modulate = nn.Linear(width, 6 * width) if shared else None
        if fixed:
            self.register_buffer("position", sinusoidal_positions(self.side, self.side, width))
        if registers:
            self.registers = nn.Parameter(torch.zeros(registers, width))
        self.head_width, self.count = width // heads if rotary else 0, registers
        blocks = [Block(width, heads, norm, swiglu, norm_heads, across, shared) for _ in range(depth)]
        self.depth, self.head, outward = depth, None, patch * patch * channels * (2 if learn_range else 1)
        if head is not None:
            wide, more, shares = head
            blocks += [Block(wide, shares, norm, swiglu, norm_heads, False, False) for _ in range(more)]
            self.head = Head(channels + widths.spatial, width, wide, patch)
            self.head_turn = wide // shares if rotary else 0
        self.blocks = nn.ModuleList(blocks)
        self.last = Last(width if head is None else head[0], outward, norm, shared and head is None)
        self.route: Route | None = None
        self.before = 0  # registers and joint tokens, in the last call
        self.fuse = tuple(fuse or ())
        self.fusion = Fusion(width) if fuse else None
        self.start()

    def start(self) -> None:
        """Xavier's matrices, and every block the identity (adaLN-Zero); the paper's section 3.2."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for embed in (self.embed, *([] if self.head is None else [self.head.embed])):
            nn.init.xavier_uniform_(embed.weight.view(embed.weight.shape[0], -1))
            nn.init.zeros_(embed.bias)
        for i in (0, 2):
            nn.init.normal_(self.level[i].weight, std=0.02)
        if self.modulate is not None:
            zero(self.modulate)
        if self.count:
            nn.init.normal_(self.registers, std=0.02)
        for block in self.blocks:
            zero(block.modulate)
            if block.attend_tokens is not None:
                zero(block.attend_tokens.out)
        if self.fusion is not None:
            self.fusion.start()
        zero(self.last.modulate)
        zero(self.last.out)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B) -> (B, C, H, W).

        Raises:
            Refusal: the patches do not divide the latents.
        """
        time = self.level(sinusoid(noise_level, 256).to(x))
        level = time if self.vector is None else time + self.vector(cond.vector.to(x))
        embedding = silu(level)
        h, (rows, columns) = self.patches(x)
        tokens, mask = (None, None) if self.read is None else visible(cond.tokens.to(x), cond.mask)
        tokens = None if self.read is None else self.read(tokens).to(x)
        h, before, mask = self.beside(h, tokens, mask)
        self.before = before
        turn = self.turn(rows, columns, before, h) if self.head_width else None
        each = last = embedding
        if self.modulate is not None:
            each, last = self.modulate(embedding), torch.cat((level, level), dim=1)
        h = self.through(h, before, each, turn, tokens, mask)[:, before:]
        h, last = (h, last) if self.head is None else self.refine(x, h, time, (rows, columns))
        h = self.last(h, last).unflatten(1, (rows, columns)).unflatten(-1, (self.patch, self.patch, -1))
        return h[..., : self.channels].permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])

    def through(
        self, h: Tensor, before: int, embedding: Tensor, turn: Turn | None, tokens: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """The same behind the blocks, but for a head's, (B, M + N, C); `route` says which patches go through which.

        Args:
            h: (B, M + N, C), tokens that stand before the patches, and the patches.
            before: M, how many stand before them.
            embedding: (B, C), the noise level and the vector, or with one layer for all blocks (B, 6 C), its shifts, scales and
                gates.
            turn: cosines and sines of the places, (M + N, D) each, or None.
            tokens, mask: (B, L, C) that blocks attend to, and (B, 1, 1, L or M + N), True where attention reads; or None.
        """
        route, dense, early, waiting, places = self.route, (turn, mask), h, h, None
        for i, block in enumerate(islice(self.blocks, self.depth), 1):
            if self.fuse and i == self.fuse[0]:
                early = h
            if route is not None and i == route.first:
                waiting, places = h, route.places(h, before)
                h, turn, mask = leave(h, places, turn, mask, self.joint)
            h = block(h, embedding, turn, tokens, mask)
            if route is not None and i == route.last:
                if self.fusion is not None:
                    waiting = self.fusion.missing(waiting)
                h, turn, mask = come_back(waiting, h, places), *dense
            if self.fuse and i == self.fuse[1]:
                h = self.fusion(early, h)
        return h

    def refine(self, x: Tensor, h: Tensor, time: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W), what the blocks say of its patches, (B, N, width), and the noise level's embedding, (B, width) -> what
        the head's blocks say, and its embedding, (B, N, its width) each.
        """
        embedding = silu(self.head.join(silu(time[:, None] + h)))
        h = self.head.embed(x).to(x).flatten(2).transpose(1, 2)
        turn = rotation(*grid, self.head_turn, h) if self.head_turn else None
        for block in islice(self.blocks, self.depth, None):
            h = block(h, embedding, turn, None, None)
        return h, embedding

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x: (B, C, H, W) -> patches in their places (B, N, width), and how many rows and columns there are."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise Refusal(
                f"The latents are {x.shape[2]}x{x.shape[3]}, which patches of {self.patch} do not divide (backbone.patch, and "
                "data.size or resolution=)."
            )
        h = self.embed(x).to(x)  # under autocast the sums of the blocks stay float32
        rows, columns = h.shape[2:]
        h = h.flatten(2).transpose(1, 2).contiguous()  # as the sums of all blocks lie from here on
        if not self.fixed:
            return h, (rows, columns)
        usual = rows == columns == self.side
        place = (
            self.position if usual else sinusoidal_positions(rows, columns, h.shape[2], (self.side, self.side)).to(self.position)
        )
        return h + place, (rows, columns)

    def beside(self, h: Tensor, tokens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
        """h: (B, N, C), tokens: (B, L, C), mask: (B, 1, 1, L) -> registers, joint tokens and patches (B, M + N, C), M, and the
        mask of what each block's attention reads: of all these, or of the tokens that it crosses to.
        """
        first = [self.registers.to(h).expand(len(h), -1, -1)] if self.count else []
        joint = self.joint and tokens is not None
        whole = torch.cat([*first, tokens, h] if joint else [*first, h], dim=1) if first or joint else h
        if joint and mask is not None:
            seen = mask.new_ones(len(h), 1, 1, self.count), mask, mask.new_ones(len(h), 1, 1, h.shape[1])
            mask = torch.cat(seen, dim=3)
        return whole, whole.shape[1] - h.shape[1], mask

    def turn(self, rows: int, columns: int, before: int, like: Tensor) -> Turn:
        """Cosines and sines of the patches' places; what stands before them is not turned."""
        cos, sin = rotation(rows, columns, self.head_width, like)
        if not before:
            return cos, sin
        return torch.cat((cos.new_ones(before, cos.shape[1]), cos)), torch.cat((sin.new_zeros(before, sin.shape[1]), sin))


class Block(nn.Module):
    """Attention and a feed-forward, each told shift, scale and gate; between them, where asked, attention to the tokens.

    Args:
        width, heads: features of a token, and heads of attention.
        norm: makes a norm of so many features.
        swiglu: a gated feed-forward in the place of GELU's.
        norm_heads: queries and keys of unit variance.
        across: whether it attends to tokens.
        shared: whether it adds a table to what all blocks are told, or has a layer of its own.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        norm: Callable[[int], nn.Module],
        swiglu: bool,
        norm_heads: bool,
        across: bool,
        shared: bool,
    ) -> None:
        super().__init__()
        self.norm_in, self.attend = norm(width), Attention(width, heads, norm_heads)
        self.attend_tokens = CrossAttention(width, heads, norm_heads) if across else None
        self.norm_out, self.feed = norm(width), SwiGLU(width) if swiglu else FeedForward(width)
        self.modulate = Table(6, width) if shared else nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, embedding: Tensor, turn: Turn | None, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """-> (B, N, C).

        Args:
            x: (B, N, C), the patches and what stands beside them.
            embedding: (B, C), of each patch (B, N, C), or with a table (B, 6 C).
            turn: cosines and sines of the places, (N, D) each, or None.
            tokens: (B, L, C), where it attends to tokens.
            mask: (B, 1, 1, L), or without such attention (B, 1, 1, N), True where it reads; None: everywhere.
        """
        shift_in, scale_in, gate_in, shift_out, scale_out, gate_out = for_each(self.modulate(embedding)).chunk(6, dim=-1)
        across = self.attend_tokens is not None
        x = torch.addcmul(x, gate_in, self.attend(modulated(self.norm_in(x), shift_in, scale_in), turn, None if across else mask))
        if self.attend_tokens is not None:
            x = x + self.attend_tokens(x, tokens, mask)
        return torch.addcmul(x, gate_out, self.feed(modulated(self.norm_out(x), shift_out, scale_out)))


class Last(nn.Module):
    """Tokens -> the pixels of their patches."""

    def __init__(self, width: int, outward: int, norm: Callable[[int], nn.Module], shared: bool) -> None:
        super().__init__()
        self.norm, self.modulate = norm(width), Table(2, width) if shared else nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, outward)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, N, C), embedding: (B, C), of each patch (B, N, C), or with a table (B, 2 C) -> (B, N, P)."""
        shift, scale = for_each(self.modulate(embedding)).chunk(2, dim=-1)
        return self.out(modulated(self.norm(x), shift, scale))


class Head(nn.Module):
    """How a wider head reads: the noisy latents' patches, and what the blocks say of each."""

    def __init__(self, channels: int, inward: int, width: int, patch: int) -> None:
        super().__init__()
        self.embed, self.join = nn.Conv2d(channels, width, patch, stride=patch), nn.Linear(inward, width)


def for_each(numbers: Tensor) -> Tensor:
    """(B, C), of all patches, or (B, N, C) -> what broadcasts over (B, N, C)."""
    return numbers if numbers.ndim == 3 else numbers[:, None]


def check_head(head: Sequence[int] | None, rotary: bool) -> None:
    """Raises Refusal where these are not a head's width, blocks and heads of attention."""
    if head is None:
        return
    if len(head) != 3 or min(head) < 1 or head[0] % head[2] or (rotary and head[0] // head[2] % 4):
        raise Refusal(
            f"backbone.head={list(head)}: wanted its width, blocks and heads of attention, which divide the width (with "
            "rotary into multiples of 4), such as [2048,2,16]."
        )


class Fusion(nn.Module):
    """What enters some blocks and what leaves them, joined; at first their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out, self.token = nn.Linear(2 * width, width), nn.Parameter(torch.zeros(width))

    def start(self) -> None:
        """Half of each."""
        half = torch.eye(self.out.out_features) / 2
        with torch.no_grad():
            self.out.weight.copy_(torch.cat((half, half), dim=1))

    def missing(self, like: Tensor) -> Tensor:
        """(B, N, C), whose shape counts -> the token that stands for what did not go through, (B, N, C)."""
        return self.token.to(like).expand_as(like)

    def forward(self, early: Tensor, late: Tensor) -> Tensor:
        """(B, N, C) each -> (B, N, C)."""
        idle = 0 * self.token.sum()  # several processes wait for its gradient, also where all patches went
        return (self.out(torch.cat((early, late), dim=2)) + idle).to(late)


class Table(nn.Module):
    """What all blocks are told, and a block's own numbers added to it."""

    def __init__(self, parts: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(parts, width))

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, parts * C) -> the same."""
        return embedding + self.table.flatten()


class Caption(nn.Module):
    """Tokens of a text tower, as wide as the patches."""

    def __init__(self, inward: int, width: int) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(inward, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, C)."""
        return self.out(gelu(self.wide(tokens), approximate="tanh"))
