"""Shows pictures to metrics and lets them count: the core of evaluate.py and of the callback that measures during training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.evaluation.ranks import rank, told
from ldm.evaluation.real import Known
from ldm.evaluation.rows import Seen, fingerprint, see
from ldm.measure import Estimate, Metric, Reference

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
    for place, sources, folder, doing in (("of", pictures, out, "judging"), ("against", real, cache, "reading")):
        for kind in dict.fromkeys(getattr(metric, place) for metric in metrics.values()):
            if kind is None:
                continue
            judges = [metric for metric in metrics.values() if getattr(metric, place) == kind]
            source = sources[kind]()
            lost, found = _see(source, judges, folder, batch, f"{doing} {kind} pictures")
            seen |= {(kind, name): reference for name, reference in found.items()}
            corrupt |= {kind: lost} if lost else {}
    numbers = None
    if rank() == 0:
        numbers = {
            name: dict(metric.compute(seen[metric.of, key(metric)].rows(), seen.get((metric.against, key(metric)))))
            for name, metric in metrics.items()
        }
    return told(numbers), corrupt


def key(metric: Metric) -> str:
    """Metrics of the same key share rows."""
    return fingerprint(dict(metric.protocol))


def _see(source: Any, judges: list[Metric], folder: Path, batch: int, doing: str) -> tuple[int, dict[str, Reference]]:
    """-> how many pictures could not be read, and what the metrics see of the others, by their keys."""
    known = {
        key(m): Known(source.moments(), lambda: source.fields([0]))
        for m in judges
        if getattr(source, "statistics", None) is not None and m.protocol["extractor"].startswith("inception")
    }
    looks = {key(m): m.look for m in judges}
    if source.count == 0:
        looks = {name: look for name, look in looks.items() if name not in known}
        if looks:
            source.fields([])
        return 0, known
    stores = see(source, looks, folder / fingerprint(dict(source.protocol)), batch, doing)
    found: dict[str, Reference] = {name: Seen(store) for name, store in stores.items()}
    lost = max((store.corrupt() for store in stores.values()), key=len)
    if lost:
        source.check(lost)
    return len(lost), found | {name: Known(k.moments, found[name].rows) for name, k in known.items()}
