"""Numbers of several evaluations beside each other, where their protocols are equal, so that only what was measured differs."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import Refusal
from ldm.files.metrics import read_metrics, shown

ASIDE = ("code", "batch")  # of a protocol, but no reason to refuse: a later version or a larger device may follow the same one


def compare(places: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """places: folders of evaluations, or their metrics.json -> a table's header and rows, one number a row.

    Raises:
        NotFound: there is no metrics.json. Refusal: nothing in common, or numbers made by different protocols.
    """
    numbers = {place: read_metrics(place) for place in places}
    if len(numbers) < 2:
        raise Refusal(f"compare={list(places)}: name two evaluations or more, compare=[A,B].")
    shared = [name for name in next(iter(numbers.values())) if all(name in entries for entries in numbers.values())]
    if not shared:
        have = "; ".join(f"{place} has {', '.join(entries)}" for place, entries in numbers.items())
        raise Refusal(f"These evaluations have no number in common: {have}.")
    first, *others = numbers
    wrong = [
        f"{name}: {field} is {a} in {first} and {b} in {other}"
        for name in shared
        for other in others
        for field, a, b in differences(numbers[first][name]["protocol"], numbers[other][name]["protocol"])
        if field not in ASIDE
    ]
    if wrong:
        more = f" ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise Refusal("These numbers were made by different protocols and do not compare:\n  " + "\n  ".join(wrong[:8]) + more)
    return ["number", *numbers], [[name, *(shown(entries[name]) for entries in numbers.values())] for name in shared]


def differences(one: Any, other: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """-> the fields in which two plain values differ: (field, its value in `one`, its value in `other`)."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = sorted(one.keys() | other.keys())
        return [d for name in names for d in differences(one.get(name), other.get(name), f"{place}.{name}".strip("."))]
    return [] if one == other else [(place, one, other)]
