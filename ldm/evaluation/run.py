"""Shows pictures to metrics and lets them count: the core of evaluate.py and of the callback that measures during training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.evaluation.real import Known
from ldm.evaluation.rows import Seen, Summarised, fingerprint, see
from ldm.files.process import from_first, rank
from ldm.measure import Estimate, FromMoments, Metric, Reference

Sources = Mapping[str, Callable[[], Any]]


def measure(
    metrics: Mapping[str, Metric], pictures: Sources, real: Sources, out: Path, cache: Path, batch: int
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int]]:
    """-> the numbers of each metric, and how many pictures of each kind could not be read, the same on every process.

    pictures: makes the sources of what is judged, `drawing` and `reconstruction`; real: those it is compared with, `reference`,
    `train` and `val`. Only what the metrics ask for is made. out: where rows of judged pictures are kept; cache: of real ones.
    """
    seen: dict[tuple[str, str], Any] = {}
    corrupt: dict[str, int] = {}
    judged = {kind: pictures[kind]() for kind in dict.fromkeys(m.of for m in metrics.values())}
    compared = {kind: real[kind]() for kind in dict.fromkeys(m.against for m in metrics.values()) if kind is not None}
    for place, sources, folder, doing in (("against", compared, cache, "reading"), ("of", judged, out, "judging")):
        for kind, source in sources.items():
            judges = [metric for metric in metrics.values() if getattr(metric, place) == kind]
            lost, found = _see(source, judges, folder, batch, f"{doing} {kind} pictures")
            seen |= {(kind, name): reference for name, reference in found.items()}
            corrupt |= {kind: lost} if lost else {}
    numbers = None
    if rank() == 0:
        numbers = {
            name: dict(metric.compute(seen[metric.of, key(metric)].rows(), seen.get((metric.against, key(metric)))))
            for name, metric in metrics.items()
        }
    return from_first(numbers), corrupt


def key(metric: Metric) -> str:
    """Metrics of the same key share rows."""
    return fingerprint(dict(metric.protocol))


def _see(source: Any, judges: list[Metric], folder: Path, batch: int, doing: str) -> tuple[int, dict[str, Reference]]:
    """-> how many pictures could not be read, and what the metrics see of the others, by their keys."""
    statistics = source.moments() if isinstance(source, Summarised) else None
    given = [m for m in judges if isinstance(m, FromMoments) and m.knows(source.features)] if statistics else []
    known = {key(m): Known(statistics, lambda: source.fields([0])) for m in given}
    looks = {key(m): m.look for m in judges}
    if source.count == 0:
        if len(given) < len(judges):
            source.fields([])
        return 0, known
    stores = see(source, looks, folder / fingerprint(dict(source.protocol)), batch, doing)
    found: dict[str, Reference] = {name: Seen(store) for name, store in stores.items()}
    lost = max((store.corrupt() for store in stores.values()), key=len)
    if lost:
        source.check(lost)
    return len(lost), found | {name: Known(k.moments, found[name].rows) for name, k in known.items()}
