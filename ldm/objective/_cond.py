"""Conditions of other samples: some of a batch's, or one again and again."""

from collections.abc import Callable

from torch import Tensor

from ldm.types import Cond


def each_slot(cond: Cond, change: Callable[[Tensor], Tensor]) -> Cond:
    """The condition, each of whose slots (B, ...) is changed."""
    slots = {name: getattr(cond, name) for name in ("vector", "tokens", "mask", "spatial")}
    return Cond(**{name: None if value is None else change(value) for name, value in slots.items()})
