"""Defaults for the members of types.py's `Embedder` that a condition may leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Batch, Draw, Embedder


def texts(values: Sequence[Any]) -> list[str]:
    """B captions, as a batch has them -> the same.

    Raises:
        Refusal: one is no text, such as a whole record.
    """
    if strange := [value for value in values if not isinstance(value, str)]:
        raise Refusal(
            f"captions are texts, found a {type(strange[0]).__name__}: {strange[0]!r:.60}. Name the member of the samples that "
            "holds them: data.fields.caption=txt."
        )
    return list(values)


class Weighted(str):
    """A caption as plain text, with the weight of each of its `parts`; `turns` are captions that alternate, one a step.

    drawing/weights.py makes it of a prompt; a condition that `weighs` applies the weights.
    """

    parts: tuple[tuple[str, float], ...]
    turns: tuple[Weighted, ...] = ()


@dataclass(frozen=True)
class Input:
    """How a person writes a field on a page.

    Args:
        kind: a line of text; a number; one of `names`; a picture, as a file; a mask, painted over the picture of another field; a
            map, painted with the labels 0, 1, ...; boxes, each of one of these.
        names: what can be chosen, or what the labels mean.
        colours: of the labels, as CSS writes them.
        low, high: of a number, if it has bounds.
        whole: the number is an integer.
        usual: what a number is if it is not written.
        over: the field of the picture that a mask is painted over.
    """

    kind: Literal["text", "number", "choice", "picture", "mask", "map", "boxes"]
    names: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    whole: bool = False
    usual: float | None = None
    over: str | None = None


class Condition(nn.Module):
    """The base of our conditions. Those of others need not inherit it: `complete` gives them the members that they lack."""

    frozen: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    hole: tuple[str, str] | None = None
    stands_for: str | None = None
    drop_from: float = 0.0
    weighs: bool = False
    cut: Any = None
    taught: tuple[str, ...] = ()

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """-> nothing: the batch holds the fields that are read."""
        return {}

    def check(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Refuses nothing."""

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Any:
        """N numbers -> (N); anything else -> a list of it."""
        numbers = all(isinstance(value, int | float) for value in values)
        return torch.tensor(list(values)) if numbers else list(values)

    def show(self, value: Any) -> Tensor | None:
        """-> None: there is no picture of it."""
        return None

    def unasked(self, field: str, size: tuple[int, int]) -> list[Any] | None:
        """-> None: the request must name the field."""
        return None

    def input(self, field: str) -> Input | None:
        """A line of text, as on the command line."""
        return Input("text")

    def skip(self, layers: int | None) -> None:
        """Reads no other layer.

        Raises:
            Refusal: another one is wanted.
        """
        if layers is not None:
            raise Refusal(f"clip_skip={layers} is for a CLIP that is read in one layer, as Stable Diffusion 1 and 2 read theirs.")

    def settings(self) -> dict[str, Any] | None:
        """-> None: its embeddings cannot be precomputed."""
        return None

    def original(self) -> Embedder | None:
        """-> None: it reads no precomputed embeddings of another condition."""
        return None


OPTIONAL = tuple(name for name in vars(Condition) if not name.startswith("__"))


def complete(embedder: Embedder) -> Embedder:
    """-> the same embedder, which gets the members of `Condition` that it lacks; one that inherits it lacks none."""
    for name in OPTIONAL:
        if not hasattr(embedder, name):
            default = vars(Condition)[name]
            setattr(embedder, name, MethodType(default, embedder) if isinstance(default, FunctionType) else default)
    return embedder
