"""Layers that several backbones share."""

import torch
from torch import Tensor, nn

from ldm.errors import Refusal


def mlp(inward: int, outward: int) -> nn.Sequential:
    """The embedding of a noise level's sinusoids or of the conditions' vector: (B, inward) -> (B, outward)."""
    return nn.Sequential(nn.Linear(inward, outward), nn.SiLU(), nn.Linear(outward, outward))


def identity(inward: int, outward: int) -> nn.Module:
    """The embedding of a vector that has the noise level embedding's width already: (B, inward) -> the same.

    Raises:
        Refusal: the widths differ.
    """
    if inward != outward:
        raise Refusal(f"The conditions' vector is {inward} wide; backbone.vector=identity adds it to {outward} numbers.")
    return nn.Identity()


def zero(layer: nn.Module) -> nn.Module:
    """-> the same layer, all its weights set to zero, so that a residual branch adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def visible(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """tokens: (B, L, D), mask: (B, L) bool -> the tokens up to the last that any sample may attend to, (B, L', D), and the mask
    for attention, (B, 1, 1, L').

    On a GPU L' is L, since to read L' the CPU would wait for the GPU.
    """
    if mask is None:
        return tokens, None
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        length = max((i for i, seen in enumerate(mask.any(dim=0).tolist(), 1) if seen), default=1)
        tokens, mask = tokens[:, :length], mask[:, :length]
    return tokens, mask[:, None, None]
