"""Captions of several members, of which each sample has one, drawn by its position: caption: {txt: 0.5, long.txt: 0.5}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import isfinite
from typing import Any

from ldm.data.order.order import generator
from ldm.data.shard.decode import is_text
from ldm.errors import Refusal

CHOICE = 2**32 + 4  # a stream of random numbers

Member = str | Mapping[str, float] | None
Mixed = dict[str, dict[str, float]]  # field -> the fields of its members, the first its own, with their shares, which sum to 1


def apart(fields: Mapping[str, Member]) -> tuple[dict[str, str], Mixed]:
    """data.fields -> the member of each field, also of the further ones that a mixture reads, `caption:long.txt`; the mixtures.

    Raises:
        Refusal: a mixture has no members, one that is no text, or a share that is none.
    """
    plain: dict[str, str] = {}
    mixed: Mixed = {}
    for field, member in fields.items():
        if not isinstance(member, Mapping):
            plain |= {field: member} if member else {}
            continue
        _check(field, member)
        names = [field if i == 0 else f"{field}:{name}" for i, name in enumerate(member)]
        plain |= dict(zip(names, member))
        mixed[field] = {name: share / sum(member.values()) for name, share in zip(names, member.values())}
    return plain, mixed


def draw(batch: dict[str, Any], mixed: Mixed, positions: Sequence[int], seed: int) -> dict[str, Any]:
    """A batch of all the members -> one with a text of each mixture for each sample: a function of the seed and the position."""
    for field, shares in mixed.items():
        texts = [batch.pop(name) for name in shares]
        ends = list(accumulate(shares.values()))
        numbers = [generator(seed, position, CHOICE).random() for position in positions]
        chosen = [next((i for i, end in enumerate(ends) if number < end), len(ends) - 1) for number in numbers]
        batch[field] = [texts[i][row] for row, i in enumerate(chosen)]
    return batch


def _check(field: str, member: Mapping[str, float]) -> None:
    told = f"data.fields.{field}={dict(member)}"
    if not member:
        raise Refusal(f"{told}: wanted members with their shares, such as {{txt: 0.5, long.txt: 0.5}}.")
    if strange := [name for name in member if not is_text(name)]:
        raise Refusal(f"{told}: {strange[0]} is no text; captions alone are mixed.")
    if wrong := [
        name for name, share in member.items() if not (isinstance(share, int | float) and 0 < share and isfinite(share))
    ]:
        raise Refusal(f"{told}: the share of {wrong[0]} is to be a number above 0; leave the others out.")
