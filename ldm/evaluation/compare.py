"""Numbers beside each other, where they were made by one protocol and differ in what was measured alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import Refusal
from ldm.files.metrics import read_metrics, shown

ASIDE = ("code", "batch")  # told, but no reason to refuse: a later version or a larger device may run the same protocol


def compare(places: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """places: folders of evaluations, or their metrics.json -> a table's header and rows, one number a row.

    Raises:
        NotFound: there is no metrics.json. Refusal: nothing in common, or numbers made by different protocols.
    """
    told = {place: read_metrics(place) for place in places}
    if len(told) < 2:
        raise Refusal(f"compare={list(places)}: name two evaluations or more, compare=[A,B].")
    shared = [name for name in next(iter(told.values())) if all(name in entries for entries in told.values())]
    if not shared:
        have = "; ".join(f"{place} has {', '.join(entries)}" for place, entries in told.items())
        raise Refusal(f"These evaluations have no number in common: {have}.")
    first, *others = told
    wrong = [
        f"{name}: {field} is {a} in {first} and {b} in {other}"
        for name in shared
        for other in others
        for field, a, b in differences(told[first][name]["protocol"], told[other][name]["protocol"])
        if field not in ASIDE
    ]
    if wrong:
        more = f" ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise Refusal("These numbers were made by different protocols and do not compare:\n  " + "\n  ".join(wrong[:8]) + more)
    return ["number", *told], [[name, *(shown(entries[name]) for entries in told.values())] for name in shared]


def differences(one: Any, other: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """The fields in which two plain values differ: (field, its value here, its value there)."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = sorted(one.keys() | other.keys())
        return [d for name in names for d in differences(one.get(name), other.get(name), f"{place}.{name}".strip("."))]
    return [] if one == other else [(place, one, other)]
