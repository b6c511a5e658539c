"""What a condition does where it says nothing else: the members of types.py's `Embedder` that may be left out, with defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Batch, Draw, Embedder


class Weighted(str):
    """A caption as plain text, with the weight of each of its `parts`; `turns` are captions that take turns, one a step.

    drawing/weights.py reads it; a condition that `weighs` heeds it.
    """

    parts: tuple[tuple[str, float], ...]
    turns: tuple[Weighted, ...] = ()


class Condition(nn.Module):
    """The base of our conditions. A condition that does not inherit it gets what it lacks by `complete`."""

    frozen: tuple[str, ...] = ()
    hole: tuple[str, str] | None = None
    stands_for: str | None = None
    drop_from: float = 0.0
    weighs: bool = False
    cut: Any = None
    taught: tuple[str, ...] = ()

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """Nothing: the batch holds what is read."""
        return {}

    def check(self, asked: Mapping[str, Sequence[Any]]) -> None:
        """Refuses nothing."""

    def read(self, field: str, asked: Sequence[Any], size: tuple[int, int]) -> Any:
        """Numbers -> (N); all else is a list, as it is."""
        numbers = all(isinstance(a, int | float) for a in asked)
        return torch.tensor(list(asked)) if numbers else list(asked)

    def show(self, value: Any) -> Tensor | None:
        """Nothing: there is no picture of it."""
        return None

    def unasked(self, field: str, size: tuple[int, int]) -> list[Any] | None:
        """Nothing: it must be written."""
        return None

    def skip(self, layers: int | None) -> None:
        """Refuses to read another layer."""
        if layers is not None:
            raise Refusal(f"clip_skip={layers} is for a CLIP that is read in one layer, as Stable Diffusion 1 and 2 read theirs.")

    def settings(self) -> dict[str, Any] | None:
        """Nothing: what it says cannot be kept ahead of time."""
        return None

    def original(self) -> Embedder | None:
        """Nothing: it stands in for no other condition."""
        return None


OPTIONAL = tuple(name for name in vars(Condition) if not name.startswith("__"))


def complete(embedder: Embedder) -> Embedder:
    """Gives an embedder what it lacks of `Condition`'s members, on the object itself; one that inherits it lacks nothing."""
    for name in OPTIONAL:
        if not hasattr(embedder, name):
            default = vars(Condition)[name]
            setattr(embedder, name, MethodType(default, embedder) if isinstance(default, FunctionType) else default)
    return embedder
