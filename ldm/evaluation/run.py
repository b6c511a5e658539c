"""Runs metrics on pictures: the core of evaluate.py and of the callback that measures during training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.evaluation.real import Known
from ldm.evaluation.rows import Seen, Summarised, fingerprint, see
from ldm.files.process import by_first
from ldm.measure import Estimate, FromMoments, Metric, Reference

Sources = Mapping[str, Callable[[], Any]]


def measure(
    metrics: Mapping[str, Metric], pictures: Sources, real: Sources, out: Path, cache: Path, batch: int
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int]]:
    """-> the numbers of each metric, and how many pictures of each kind could not be read, the same on every process.

    Args:
        metrics: by name.
        pictures: makers of the sources that are judged, by kind: `drawing`, `reconstruction`; only those needed are made.
        real: makers of the sources that these are compared with, by kind: `reference`, `train`, `val`.
        out: the folder for rows of judged pictures.
        cache: the folder for rows of real pictures.
        batch: pictures at a time.

    Raises:
        Refusal: more pictures are unreadable than a source allows, or as a metric's `look` or `compute`.
    """
    seen: dict[tuple[str, str], Any] = {}
    corrupt: dict[str, int] = {}
    judged = {kind: pictures[kind]() for kind in dict.fromkeys(m.of for m in metrics.values())}
    compared = {kind: real[kind]() for kind in dict.fromkeys(m.against for m in metrics.values()) if kind is not None}
    for place, sources, folder, doing in (("against", compared, cache, "reading"), ("of", judged, out, "judging")):
        for kind, source in sources.items():
            judges = [metric for metric in metrics.values() if getattr(metric, place) == kind]
            lost, references = _see(source, judges, folder, batch, f"{doing} {kind} pictures")
            seen |= {(kind, name): reference for name, reference in references.items()}
            corrupt |= {kind: lost} if lost else {}

    def numbers() -> dict[str, dict[str, Any]]:
        return {
            name: dict(metric.compute(seen[metric.of, key(metric)].rows(), seen.get((metric.against, key(metric)))))
            for name, metric in metrics.items()
        }

    return by_first(numbers), corrupt


def key(metric: Metric) -> str:
    """-> a hash of a metric's protocol; metrics with equal ones share rows."""
    return fingerprint(dict(metric.protocol))


def _see(source: Any, judges: list[Metric], folder: Path, batch: int, doing: str) -> tuple[int, dict[str, Reference]]:
    """-> how many pictures could not be read, and the rows of the others, by the metrics' keys."""
    statistics = source.moments() if isinstance(source, Summarised) else None
    given = [m for m in judges if isinstance(m, FromMoments) and m.knows(source.features)] if statistics else []
    known = {key(m): Known(statistics, lambda: source.fields([0])) for m in given}
    looks = {key(m): m.look for m in judges}
    if source.count == 0:
        if len(given) < len(judges):
            source.fields([])
        return 0, known
    stores = see(source, looks, folder / fingerprint(dict(source.protocol)), batch, doing)
    references: dict[str, Reference] = {name: Seen(store) for name, store in stores.items()}
    lost = max((store.corrupt() for store in stores.values()), key=len)
    if lost:
        source.check(lost)
    return len(lost), references | {name: Known(k.moments, references[name].rows) for name, k in known.items()}
