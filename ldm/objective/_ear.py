"""What a network's block says, heard while others call the network."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.errors import Refusal
from ldm.nn.route import Behind, Routed
from ldm.types import Backbone, Cond, Widths

SIDE = 16  # latents, which patches and a U-Net's levels divide


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


def features_of(backbone: Any, layer: int, channels: int, widths: Widths) -> int:
    """How many features a patch a block says, seen on the meta device, where nothing is computed.

    Args:
        backbone: a torch module. layer: of its blocks, 1 the first.
        channels: of the latents. widths: of the conditions.

    Raises:
        Refusal: there is no such block, or the backbone cannot be called so.
    """
    ear, block = Ear(), block_of(backbone, layer)
    x = torch.empty(1, channels + widths.spatial, SIDE, SIDE, device="meta")
    vector = x.new_empty(1, widths.vector) if widths.vector else None
    cond = Cond(vector=vector, tokens=x.new_empty(1, 1, widths.tokens) if widths.tokens else None)
    empty = {name: value.to("meta") for name, value in (*backbone.named_parameters(), *backbone.named_buffers())}
    hook = block.register_forward_hook(ear)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            functional_call(backbone, empty, (x, x.new_empty(1), cond))
        return as_map(ear.take(), x, backbone).shape[1]
    except (Refusal, RuntimeError, NotImplementedError) as error:
        raise Refusal(f"objective.width must be said, the features of block {layer}: {error}") from error
    finally:
        hook.remove()


def as_map(hidden: Tensor, x: Tensor, backbone: Any) -> Tensor:
    """Maps (B, C, h, w), or tokens (B, N, C), of which the last are x's (B, _, H, W) patches in rows -> (B, C, h, w).

    Raises:
        Refusal: these are not one token a square patch, of all patches.
    """
    if hidden.ndim == 4:
        return hidden
    shape = tuple(hidden.shape)
    if hidden.ndim == 3 and isinstance(backbone, Behind):
        hidden = hidden[:, backbone.before :]
    side = math.sqrt(x[0, 0].numel() / max(1, hidden.shape[1])) if hidden.ndim == 3 else 0.5
    some = isinstance(backbone, Routed) and side != backbone.patch
    if some or side % 1 or x.shape[2] % side or x.shape[3] % side:
        raise Refusal(
            f"The block says {shape} of latents {tuple(x.shape)}, which is no feature a patch: choose another "
            "objective.layer, before those that objective=route sends fewer patches through, or behind them."
        )
    return hidden.transpose(1, 2).unflatten(2, (int(x.shape[2] // side), int(x.shape[3] // side)))
