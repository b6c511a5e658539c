"""Gathers every embedder's part into one condition, and drops it now and then."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.embedder import complete
from ldm.errors import Refusal
from ldm.types import Batch, Cond, Draw, Embedder, Widths


class Conditioner(nn.Module):
    """The conditions of a model, in order, each with its own dropout rate.

    The null condition is not another code path: it is dropout of everything that is ever dropped. A rate of 0 means
    that a condition is never dropped, not in the null either. `hole`: the fields of an inpainting model's picture and mask.
    An embedder may lack the members that embedder.py has defaults for: it gets them here.

    Raises:
        Refusal: a rate that is no share.
    """

    def __init__(self, embedders: Mapping[str, Embedder]) -> None:
        super().__init__()
        self.embedders = nn.ModuleDict()
        self.widths, self.fields, self.hole = Widths(), (), None
        for name, embedder in embedders.items():
            self.add(name, embedder)

    def add(self, name: str, embedder: Embedder) -> None:
        """One more condition, behind the others."""
        if not 0 <= embedder.rate <= 1:
            raise Refusal(f"condition.{name}.rate={embedder.rate}: wanted 0 (never dropped) to 1.")
        self.embedders[name] = complete(embedder)
        if not 0 <= embedder.drop_from <= 1 - embedder.rate:
            raise Refusal(f"condition.{name}.drop_from={embedder.drop_from}: wanted 0 to 1 - rate, which is {embedder.rate}.")
        self.widths += embedder.widths
        self.fields = tuple(dict.fromkeys((*self.fields, *self.fields_of(embedder))))
        self.hole = self.hole or embedder.hole

    def forward(self, batch: Batch, draw: Draw | None = None, only: Sequence[str] | None = None) -> Cond:
        """Reads each embedder's fields of the batch.

        With `draw`, each is dropped at its own rate, sample by sample; with `only`, those not named are dropped, or told the
        batch's `negative.<field>` in the place of their field where there is one.

        Raises:
            Refusal: the batch lacks a field, or `only` names a condition that the model does not have.
        """
        unknown = set(only or ()) - set(self.embedders)
        if unknown:
            raise Refusal(f"This model has the conditions {list(self.embedders)}, not {sorted(unknown)}.")
        batch, cond = self.fill(batch, draw), Cond()
        for name, embedder in self.embedders.items():
            negative = {} if only is None or name in only else self._negative(embedder, batch)
            value = _value(name, embedder, {**batch, **negative})
            count = len(value) if isinstance(embedder.key, str) else len(value[0])
            drop = self._drop(name, embedder, count, draw, only)
            cond = cond + embedder(value, torch.zeros_like(drop) if negative else drop)
        return cond

    def fill(self, batch: Batch, draw: Draw | None = None) -> dict[str, Any]:
        """The batch, with the fields that its conditions derive from others where it lacks them."""
        filled = dict(batch)
        for embedder in self.embedders.values():
            filled |= embedder.derive(filled, draw)
        return filled

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """What conditions with a picture to them were told, by name: (B, 3, h, w) in [-1, 1] each."""
        shown = {n: e.show(_value(n, e, self.fill(batch))) for n, e in self.embedders.items()}
        return {name: picture for name, picture in shown.items() if picture is not None}

    @staticmethod
    def fields_of(embedder: Embedder) -> tuple[str, ...]:
        """The batch fields that an embedder reads."""
        return (embedder.key,) if isinstance(embedder.key, str) else tuple(embedder.key)

    def _negative(self, embedder: Embedder, batch: Batch) -> dict[str, Any]:
        return {field: batch[f"negative.{field}"] for field in self.fields_of(embedder) if f"negative.{field}" in batch}

    @staticmethod
    def _drop(name: str, embedder: Embedder, count: int, draw: Draw | None, only: Sequence[str] | None) -> Tensor:
        if draw is not None:
            number = draw.uniform(f"drop/{embedder.stands_for or name}") - embedder.drop_from
            return (number >= 0) & (number < embedder.rate)
        return torch.full((count,), only is not None and name not in only and embedder.rate > 0)


def _value(name: str, embedder: Embedder, batch: Batch) -> Any:
    for field in Conditioner.fields_of(embedder):
        if field not in batch:
            raise Refusal(
                f"Condition '{name}' reads the field '{field}', but there is only {sorted(batch)}. "
                f"Add it to data.fields (or ask.{field}=... when sampling), or take '{name}' out of condition=[...]."
            )
    return batch[embedder.key] if isinstance(embedder.key, str) else [batch[field] for field in embedder.key]
