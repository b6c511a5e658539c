"""Blocks that only some of a picture's patches go through; the others wait, and come back in their places."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.nn.transformer import Turn


@dataclass(frozen=True)
class Route:
    """Through blocks `first` to `last`, of which 1 is the first, go the patches `kept`: (B, K) places, ascending."""

    first: int
    last: int
    kept: Tensor

    def places(self, x: Tensor, before: int) -> Tensor:
        """x: (n B, M + N, C), of which the M = `before` tokens in front always go -> places of what goes (n B, M + K, 1)."""
        kept = self.kept.to(x.device, non_blocking=True).repeat(len(x) // len(self.kept), 1) + before
        first = torch.arange(before, device=x.device).expand(len(kept), -1)
        return torch.cat((first, kept), dim=1)[..., None]


@runtime_checkable
class Routed(Protocol):
    """A backbone, a torch module, whose blocks need not see all patches."""

    patch: int  # latents of `patch` x `patch` are one
    blocks: Iterable[nn.Module]
    route: Route | None  # of the calls to come; None: all patches go through all blocks
    fuse: tuple[int, ...]  # two blocks, of which it joins what enters the one and what leaves the other; or none


def leave(
    x: Tensor, places: Tensor, turn: Turn | None, mask: Tensor | None, own: bool
) -> tuple[Tensor, Turn | None, Tensor | None]:
    """x: (B, N, C), places: (B, K, 1), turn: (N, D) each, mask: (B, 1, 1, L) -> those of the ones that go.

    own: whether the mask is of x itself, whose patches all are seen, and not of another sequence.
    """
    kept = x.gather(1, places.expand(-1, -1, x.shape[2]))
    turn = None if turn is None else (turn[0][places[..., 0]][:, None], turn[1][places[..., 0]][:, None])
    return kept, turn, mask[..., : kept.shape[1]] if own and mask is not None else mask


def come_back(waiting: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """x: (B, K, C), put among those that waited: (B, N, C), at its places: (B, K, 1) -> (B, N, C)."""
    return waiting.scatter(1, places.expand(-1, -1, x.shape[2]), x.to(waiting))
