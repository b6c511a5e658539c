"""The conditioner: every condition of a model joined into one `Cond`, with dropout for classifier-free guidance.

cond = e_1(fields_1) + e_2(fields_2) + ..., where each e_i is dropped for a share rate_i of the samples in training
(https://arxiv.org/abs/2207.12598, algorithm 1)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.embedder import complete
from ldm.errors import Refusal
from ldm.types import Batch, Cond, Draw, Embedder, Widths


class Conditioner(nn.Module):
    """The conditions of a model by name, in order, each with its own dropout rate.

    The null condition is no other code path: it is dropout of everything that is ever dropped. A condition with rate 0 is never
    dropped, not in the null condition either. `widths` are those of the joined `Cond`, `fields` the batch fields that are read,
    `hole` the fields of an inpainting model's picture and mask. An embedder gets here the members that it lacks and that
    embedder.py has defaults for.

    Raises:
        Refusal: a rate outside [0, 1], or tokens of several widths.
    """

    def __init__(self, embedders: Mapping[str, Embedder]) -> None:
        super().__init__()
        self.embedders = nn.ModuleDict()
        self.widths, self.fields, self.hole = Widths(), (), None
        for name, embedder in embedders.items():
            self.add(name, embedder)

    def add(self, name: str, embedder: Embedder) -> None:
        """Adds a condition behind the others.

        Raises:
            Refusal: as the class.
        """
        self.embedders[name] = complete(embedder)
        self.check(name)
        self.widths += embedder.widths
        self.fields = tuple(dict.fromkeys((*self.fields, *self.fields_of(embedder))))
        self.hole = self.hole or embedder.hole

    def check(self, name: str, said: str = "condition.{}.rate") -> None:
        """Raises Refusal where a condition cannot be dropped at its rate, which is `said` so, from where its share begins."""
        embedder, said = self.embedders[name], said.format(name)
        if not 0 <= embedder.rate <= 1:
            raise Refusal(f"{said}={embedder.rate}: wanted 0 (never dropped) to 1.")
        if not 0 <= embedder.drop_from <= 1 - embedder.rate:
            raise Refusal(f"condition.{name}.drop_from={embedder.drop_from}: wanted 0 to 1 - rate, and {said}={embedder.rate}.")

    def forward(self, batch: Batch, draw: Draw | None = None, only: Sequence[str] | None = None) -> Cond:
        """The fields of B samples -> their `Cond`, the parts in the conditioner's order.

        With `draw`, each condition is dropped at its rate, sample by sample. With `only`, those that it does not name are
        dropped; one of them whose field has a `negative.<field>` in the batch reads that instead.

        Raises:
            Refusal: the batch lacks a field, or `only` names a condition that the model does not have.
        """
        return sum(self.parts(batch, draw, only).values(), Cond())

    def parts(
        self, batch: Batch, draw: Draw | None = None, only: Sequence[str] | None = None, said: Mapping[str, Cond] | None = None
    ) -> dict[str, Cond]:
        """As a call, but what each condition says, by name, in order; those in `said` have said it already."""
        unknown = set(only or ()) - set(self.embedders)
        if unknown:
            raise Refusal(f"This model has the conditions {list(self.embedders)}, not {sorted(unknown)}.")
        batch, parts = self.fill(batch, draw), {}
        for name, embedder in self.embedders.items():
            if said is not None and name in said:
                parts[name] = said[name]
                continue
            negative = {} if only is None or name in only else self._negative(embedder, batch)
            value = _value(name, embedder, {**batch, **negative})
            count = len(value) if isinstance(embedder.key, str) else len(value[0])
            drop = self._drop(name, embedder, count, draw, only)
            parts[name] = embedder(value, torch.zeros_like(drop) if negative else drop)
        return parts

    def fill(self, batch: Batch, draw: Draw | None = None) -> dict[str, Any]:
        """-> the batch and the fields that it lacks and that conditions derive from its others, such as masks."""
        filled = dict(batch)
        for embedder in self.embedders.values():
            filled |= embedder.derive(filled, draw)
        return filled

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """-> pictures of the batch's conditions by name, of those that can be shown: (B, 3, h, w) in [-1, 1] each."""
        pictures = {n: e.show(_value(n, e, self.fill(batch))) for n, e in self.embedders.items()}
        return {name: picture for name, picture in pictures.items() if picture is not None}

    @staticmethod
    def fields_of(embedder: Embedder) -> tuple[str, ...]:
        """-> the batch fields that an embedder reads."""
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
