"""What a network's block says, heard while others call the network."""

import math
from typing import Any

from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.nn.route import Routed
from ldm.types import Backbone


class Ear:
    """Hears what a block says. It stays there: compiled blocks run the hooks that they had when they were first called."""

    def __init__(self) -> None:
        self.block: nn.Module | None = None
        self.heard: Any = None

    def put(self, block: nn.Module) -> None:
        """Listens to this block from now on."""
        if block is not self.block:
            self.block = block
            block.register_forward_hook(self)

    def __call__(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.heard = output

    def take(self) -> Tensor:
        """What was said last: the first tensor of it, once."""
        heard, self.heard = self.heard, None
        return heard[0] if isinstance(heard, tuple) else heard

    def __deepcopy__(self, memo: Any) -> "Ear":
        return Ear()


def block_of(backbone: Backbone, layer: int) -> nn.Module:
    """A block by its number, 1 the first.

    Raises:
        Refusal: there is no such block.
    """
    blocks = list(backbone.blocks)
    if not 1 <= layer <= len(blocks):
        raise Refusal(f"objective.layer={layer}: the backbone has {len(blocks)} blocks, 1 to {len(blocks)}.")
    return blocks[layer - 1]


def as_map(hidden: Tensor, x: Tensor, backbone: Any = None) -> Tensor:
    """Maps (B, C, h, w), or tokens (B, N, C) of x's (B, _, H, W) patches in rows -> (B, C, h, w).

    Raises:
        Refusal: these are not one token a square patch, of all patches.
    """
    if hidden.ndim == 4:
        return hidden
    side = math.sqrt(x[0, 0].numel() / hidden.shape[1]) if hidden.ndim == 3 else 0.5
    some = isinstance(backbone, Routed) and side != backbone.patch
    if some or side % 1 or x.shape[2] % side or x.shape[3] % side:
        raise Refusal(
            f"The block says {tuple(hidden.shape)} of latents {tuple(x.shape)}, which is no feature a patch: choose another "
            "objective.layer, before those that objective=route sends fewer patches through, or behind them."
        )
    return hidden.transpose(1, 2).unflatten(2, (int(x.shape[2] // side), int(x.shape[3] // side)))
