"""The vision transformer (https://arxiv.org/abs/2010.11929), as encoders of pictures are built of it that others trained.

x <- x + s1 * attention(norm(x));  x <- x + s2 * feed(norm(x)),   s1 = s2 = 1, or learnt (https://arxiv.org/abs/2103.17239)
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from ldm.errors import Refusal
from ldm.nn.transformer import Attention


class ViT(nn.Module):
    """Pictures (B, 3, P h, P w), normalised -> the features of each patch, (B, width, h, w), with zero mean and unit variance.

    DINOv2 with registers, SigLIP and MAE are such networks. The last norm has no weights: they are left out of a published one.

    Args:
        patch: pixels a side of a patch, P.
        width, depth, heads: features of a token, blocks, and heads of attention in each.
        inner: features within the feed-forward.
        side: patches a side that the learnt positions are of; for other pictures they are interpolated.
        first: whether a token of the whole picture, with a position of its own, stands before the patches.
        registers: learnt tokens beside the patches, that mean nothing (https://arxiv.org/abs/2309.16588).
        scaled: whether what each layer adds is multiplied by learnt numbers.
        tanh: whether the GELU is its tanh approximation.
        antialias: whether positions are averaged where they are laid over fewer patches.
        eps: of the norms.

    Raises:
        Refusal: the heads do not divide the width.
    """

    def __init__(
        self,
        patch: int = 14,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        inner: int = 3072,
        side: int = 37,
        first: bool = True,
        registers: int = 4,
        scaled: bool = True,
        tanh: bool = False,
        antialias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if width % heads:
            raise Refusal(f"autoencoder.encoder: width={width} must divide into heads={heads}.")
        self.patch, self.width, self.heads, self.side, self.antialias = patch, width, heads, side, antialias
        self.kind = {"first": first, "registers": registers, "scaled": scaled, "tanh": tanh, "antialias": antialias, "eps": eps}
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(first + side**2, width))
        self.first = nn.Parameter(0.02 * torch.randn(width)) if first else None
        self.registers = nn.Parameter(0.02 * torch.randn(registers, width)) if registers else None
        self.blocks = nn.ModuleList(Block(width, heads, inner, eps, scaled, tanh) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, P h, P w) -> (B, width, h, w)."""
        h = self.embed(pixels)
        rows, columns = h.shape[2:]
        h = h.flatten(2).transpose(1, 2) + self.positions(rows, columns)
        whole = [] if self.first is None else [(self.first + self.position[0])[None]]
        before = [*whole, *([] if self.registers is None else [self.registers])]
        h = torch.cat([*(x.to(h).expand(len(h), -1, -1) for x in before), h], dim=1)
        for block in self.blocks:
            h = block(h)
        return self.norm(h[:, -rows * columns :]).transpose(1, 2).unflatten(2, (rows, columns))

    def positions(self, rows: int, columns: int) -> Tensor:
        """-> (rows * columns, width)."""
        table = self.position[len(self.position) - self.side**2 :]
        if rows == columns == self.side:
            return table
        table = table.T.unflatten(1, (self.side, self.side))[None]
        laid = interpolate(table, (rows, columns), mode="bicubic", antialias=self.antialias)
        return laid[0].flatten(1).T


class Block(nn.Module):
    """Attention and a feed-forward, each of the normalised features and added to them.

    Args:
        width: features of a token, C.
        heads: of attention.
        inner: features within the feed-forward.
        eps: of the norms.
        scaled: whether what is added is multiplied by learnt numbers.
        tanh: whether the GELU is its tanh approximation.
    """

    def __init__(self, width: int, heads: int, inner: int, eps: float, scaled: bool = False, tanh: bool = False) -> None:
        super().__init__()
        self.gelu = "tanh" if tanh else "none"
        self.norm_in, self.attend = nn.LayerNorm(width, eps=eps), Attention(width, heads, False)
        self.norm_out, self.wide, self.narrow = nn.LayerNorm(width, eps=eps), nn.Linear(width, inner), nn.Linear(inner, width)
        self.scale_in, self.scale_out = (nn.Parameter(torch.ones(width)) if scaled else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        added = self.attend(self.norm_in(x))
        x = x + (added if self.scale_in is None else self.scale_in * added)
        added = self.narrow(gelu(self.wide(self.norm_out(x)), approximate=self.gelu))
        return x + (added if self.scale_out is None else self.scale_out * added)
