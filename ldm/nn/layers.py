"""Layers that several backbones share."""

import torch
from torch import Tensor, nn

from ldm.errors import Refusal


def mlp(inward: int, outward: int) -> nn.Sequential:
    """How a noise level or a vector enters: (B, inward) -> (B, outward)."""
    return nn.Sequential(nn.Linear(inward, outward), nn.SiLU(), nn.Linear(outward, outward))


def identity(inward: int, outward: int) -> nn.Module:
    """How a vector enters that has the embedding's width already: as it is.

    Raises:
        Refusal: it has another.
    """
    if inward != outward:
        raise Refusal(f"The conditions' vector is {inward} wide; backbone.vector=identity adds it to {outward} numbers.")
    return nn.Identity()


def zero(layer: nn.Module) -> nn.Module:
    """The layer, with all its weights at zero: a residual branch that starts silent."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def visible(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """tokens: (B, L, D), mask: (B, L) -> those that any sample may see, (B, L', D), and the mask for attention (B, 1, 1, L').

    On a GPU L' is L: to ask it how many would be to wait for it.
    """
    if mask is None:
        return tokens, None
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        length = int(mask.any(dim=0).numpy().nonzero()[0].max(initial=0)) + 1
        tokens, mask = tokens[:, :length], mask[:, :length]
    return tokens, mask[:, None, None]
