"""Shows pictures to metrics and lets them count: the core of evaluate.py and of the callback that measures during training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.evaluation.ranks import rank, told
from ldm.evaluation.rows import Seen, Source, fingerprint, see
from ldm.measure import Estimate, Metric, Reference

Sources = Mapping[str, Callable[[], Any]]


def measure(
    metrics: Mapping[str, Metric], pictures: Sources, real: Sources, out: Path, cache: Path, batch: int
) -> dict[str, dict[str, Estimate]]:
    """-> the numbers of each metric, the same on every process.

    pictures: makes the sources of what is judged, `drawing` and `reconstruction`; real: those it is compared with, `reference`
    and `train`. Only what the metrics ask for is made. out: where rows of judged pictures are kept; cache: those of real ones.
    """
    seen: dict[tuple[str, str], Any] = {}
    for place, sources, folder, doing in (("of", pictures, out, "judging"), ("against", real, cache, "reading")):
        for kind in dict.fromkeys(getattr(metric, place) for metric in metrics.values()):
            judges = {key(m): m.look for m in metrics.values() if getattr(m, place) == kind}
            if kind is None:
                continue
            source = sources[kind]()
            names = _see(source, judges, folder, batch, f"{doing} {kind} pictures")
            seen |= {(kind, name): store for name, store in names.items()}
    numbers = None
    if rank() == 0:
        numbers = {
            name: dict(metric.compute(seen[metric.of, key(metric)].rows(), seen.get((metric.against, key(metric)))))
            for name, metric in metrics.items()
        }
    return told(numbers)


def key(metric: Metric) -> str:
    """Metrics of the same key share rows."""
    return fingerprint(dict(metric.protocol))


def _see(source: Source | Reference, looks: Mapping[str, Any], folder: Path, batch: int, doing: str) -> dict[str, Reference]:
    if not hasattr(source, "images"):  # statistics, which were made elsewhere
        return dict.fromkeys(looks, source)
    place = folder / fingerprint(dict(source.protocol))
    return {name: Seen(store) for name, store in see(source, looks, place, batch, doing).items()}
