"""Layers that several backbones share."""

from torch import nn


def mlp(inward: int, outward: int) -> nn.Sequential:
    """How a noise level or a vector enters: (B, inward) -> (B, outward)."""
    return nn.Sequential(nn.Linear(inward, outward), nn.SiLU(), nn.Linear(outward, outward))


def identity(inward: int, outward: int) -> nn.Module:
    """How a vector enters that has the embedding's width already: as it is.

    Raises:
        ValueError: it has another.
    """
    if inward != outward:
        raise ValueError(f"The conditions' vector is {inward} wide; backbone.vector=identity adds it to {outward} numbers.")
    return nn.Identity()


def zero(layer: nn.Module) -> nn.Module:
    """The layer, with all its weights at zero: a residual branch that starts silent."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
