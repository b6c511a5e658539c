"""Numbers about a picture: its first size, its crop, the size wanted, an aesthetic score."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.condition._files import numbers
from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.nn.sinusoid import sinusoid
from ldm.types import Batch, Cond, Draw, Widths


class Number(Condition):
    """Each number -> `width` sinusoidal features, joined by width into a vector (SDXL, https://arxiv.org/abs/2307.01952, 2.2).

    `fields` names the numbers, in order: batch fields, or else entries of the batch's `json` records. With each stands what a
    request means that does not say it: a number, `height` or `width` of the picture asked for, or None: it must be said.
    `scale` multiplies all numbers first: a score from 0 to 10 wants about 100, for a wave to tell 5 from 6.
    With rate 0 they are told in the null as well, as SDXL's are; a dropped vector is zeros.
    """

    def __init__(self, fields: Mapping[str, float | str | None], width: int = 256, scale: float = 1.0, rate: float = 0.0) -> None:
        super().__init__()
        self.usual, self.width, self.scale, self.rate = dict(fields), width, scale, rate
        self.key, self.widths = tuple(fields), Widths(vector=width * len(fields))

    def forward(self, value: Sequence[Any], drop: Tensor) -> Cond:
        """value: for each field B numbers, drop: (B) bool -> vector: (B, fields * width)."""
        numbers = [torch.as_tensor(v, dtype=torch.float32, device=drop.device) * self.scale for v in value]
        vector = torch.cat([sinusoid(v, self.width) for v in numbers], dim=1)
        return Cond(vector=vector.masked_fill(drop[:, None], 0.0))

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """The numbers that the batch lacks, from its records, or the usual ones where a record does not say or is not there.

        Raises:
            Refusal: a record lacks one, or has something else there.
        """
        usual = {name: u for name, u in self.usual.items() if isinstance(u, int | float)}
        lacking = [name for name in self.usual if name not in batch]
        if "json" not in batch:
            return {name: [usual[name]] * len(batch["position"]) for name in lacking if name in usual and "position" in batch}
        return {name: [_number(usual | r, name) for r in batch["json"]] for name in lacking}

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Numbers -> (N)."""
        return numbers(field, values)

    def input(self, field: str) -> Input:
        """A number."""
        usual = self.usual[field]
        return Input("number", usual=usual if isinstance(usual, int | float) else None)

    def unasked(self, field: str, size: tuple[int, int]) -> list[float] | None:
        """What a request of a picture of `size`, height and width, means where it does not say the field."""
        usual = {"height": size[0], "width": size[1]}.get(str(self.usual[field]), self.usual[field])
        return None if usual is None else [float(usual)]


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        numbers = sorted(k for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool))
        raise Refusal(
            f"Condition 'number' reads {name!r} in the json of each sample and found {value!r}; the numbers there are {numbers}. "
            "Name one of these in condition.number.fields, or leave such samples out."
        )
    return float(value)
