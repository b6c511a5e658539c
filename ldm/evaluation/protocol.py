"""What an evaluation writes: numbers, each with its protocol, which is everything that it depends on, and metrics' pictures."""

import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchvision.utils import make_grid, save_image

from ldm.files.metrics import shown, write_metrics
from ldm.files.table import show as table
from ldm.files.whole import write_whole
from ldm.measure import Estimate, Metric, Showing

HERE = Path(__file__).parent


def entries(
    numbers: Mapping[str, Mapping[str, Estimate]],
    metrics: Mapping[str, Metric],
    sources: Mapping[str, Any],
    settings: Mapping[str, Any],
    subject: Mapping[str, Any],
    corrupt: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """-> the entries of metrics.json: number -> value, standard error, note, `subject`, `protocol`, and `corrupt`.

    Args:
        numbers: estimates by number, by metric.
        metrics: those that made them, by name.
        sources: of the pictures that were used, by kind: drawing, reconstruction, reference, train.
        settings: what else the numbers depend on, as plain values.
        subject: what was measured, as plain values.
        corrupt: how many pictures of a kind could not be read, where some could not.
    """
    entries = {}
    for name, estimates in numbers.items():
        metric = metrics[name]
        pictures, reference = sources[metric.of], sources.get(metric.against)
        protocol = {
            **metric.protocol,
            "of": metric.of,
            "count": pictures.count,
            **{k: v for k, v in pictures.protocol.items() if k not in ("model", "recipe", "pictures")},
            "reference": None if reference is None else dict(reference.protocol),
            **settings,
        }
        for number, estimate in estimates.items():
            entries[number] = {"value": estimate.value, "error": estimate.error, "subject": dict(subject), "protocol": protocol}
            entries[number] |= {} if estimate.note is None else {"note": estimate.note}
            entries[number] |= {"corrupt": dict(corrupt)} if corrupt else {}
    return entries


def write_numbers(numbers: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Writes OUT/metrics.json, of the entries that `entries` makes, and prints the numbers."""
    write_metrics(numbers, out)
    table(("number", "value", "note"), [(name, shown(entry), entry.get("note", "")) for name, entry in numbers.items()])
    print(f"The numbers, each with its protocol, are in {out}/metrics.json", flush=True)


def show(metrics: Mapping[str, Metric], sources: Mapping[str, Any], out: Path) -> None:
    """Writes OUT/<metric>.png for each metric that shows pictures; `sources` are those of the pictures, by kind."""
    for name, metric in metrics.items():
        if isinstance(metric, Showing):
            judged, real = (lambda n, s=sources[k]: s.images(n, s.fields(n)) for k in (metric.of, metric.against))
            pictures = metric.show(judged, real).add(1).div(2).clamp(0, 1)
            grid = make_grid(pictures, nrow=len(pictures) // 2, padding=1, pad_value=1.0)
            write_whole(out / f"{name}.png", lambda path, grid=grid: save_image(grid, path, format="png"))


def code_version() -> str:
    """-> the commit of this code, with `+` where files have changed since; the package's version where there is no repository."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return f"{commit}{'+' if changed else ''}" if commit else version("ldm")
