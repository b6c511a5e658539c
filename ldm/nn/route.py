"""Routing: some of a picture's patches skip blocks of a transformer, and come back in their places (TREAD,
https://arxiv.org/abs/2501.04765).

x_K <- block(x_K) for the patches K that go through the blocks; the others stay as they are
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.nn.transformer import Turn


@dataclass(frozen=True)
class Route:
    """Which patches go through blocks `first` to `last`, counted from 1: those at `chosen`, (B, K), ascending."""

    first: int
    last: int
    chosen: Tensor

    def places(self, x: Tensor, before: int) -> Tensor:
        """x: (n B, M + N, C), M = `before` tokens, which always go through, then N patches -> the places of all that go through,
        (n B, M + K, 1).
        """
        chosen = self.chosen.to(x.device, non_blocking=True).repeat(len(x) // len(self.chosen), 1) + before
        first = torch.arange(before, device=x.device).expand(len(chosen), -1)
        return torch.cat((first, chosen), dim=1)[..., None]

    def __deepcopy__(self, memo: object) -> None:
        """-> None: a copy of a backbone, such as its average, that is made on the way sees all patches."""


@runtime_checkable
class Routed(Protocol):
    """A backbone, a torch module, whose `blocks` some patches can skip; isinstance sees no modules from Python 3.12 on."""

    patch: int  # latents a side of a patch
    depth: int  # the blocks that patches can skip: the first so many
    route: Route | None  # of the next calls; None: all patches go through all blocks
    fuse: tuple[int, ...]  # two blocks: the input of the first is joined with the output of the second; or none


@runtime_checkable
class Behind(Protocol):
    """A backbone in whose blocks other tokens stand before the patches."""

    before: int  # how many did in the last call


def leave(
    x: Tensor, places: Tensor, turn: Turn | None, mask: Tensor | None, joint: bool
) -> tuple[Tensor, Turn | None, Tensor | None]:
    """-> x, turn and mask of the patches and tokens that go through the blocks.

    Args:
        x: (B, N, C).
        places: (B, K, 1), of those that go through.
        turn: cosines and sines of rotary positions, (N, D) each -> (B, 1, K, D) each.
        mask: (B, 1, 1, L) bool -> the first K of it where `joint`, else itself.
        joint: whether the mask is of x, none of whose patches is masked, and not of another sequence.
    """
    chosen = x.gather(1, places.expand(-1, -1, x.shape[2]))
    turn = None if turn is None else (turn[0][places[..., 0]][:, None], turn[1][places[..., 0]][:, None])
    return chosen, turn, mask[..., : chosen.shape[1]] if joint and mask is not None else mask


def come_back(waiting: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """waiting: (B, N, C), before the blocks; x: (B, K, C), behind the blocks, at places: (B, K, 1) -> both joined, (B, N, C)."""
    return waiting.scatter(1, places.expand(-1, -1, x.shape[2]), x.to(waiting))
