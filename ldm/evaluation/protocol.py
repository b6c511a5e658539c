"""What an evaluation leaves: numbers, beside each everything that it depends on, and what metrics have to show."""

import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchvision.utils import make_grid, save_image

from ldm.files.metrics import shown, write_metrics
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
    """What metrics.json holds: number -> value, standard error, what was measured (`subject`), and the `protocol`.

    sources: those that were used, by kind; settings: what else the pictures depend on; corrupt: how many of a kind could not be
    read.
    """
    told = {}
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
            told[number] = {"value": estimate.value, "error": estimate.error, "subject": dict(subject), "protocol": protocol}
            told[number] |= {} if estimate.note is None else {"note": estimate.note}
            told[number] |= {"corrupt": dict(corrupt)} if corrupt else {}
    return told


def tell(told: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Writes OUT/metrics.json and prints the numbers."""
    write_metrics(told, out)
    for name, entry in told.items():
        print(f"{name:28s} {shown(entry)}")
        if "note" in entry:
            print(f"    {entry['note']}")
    print(f"The numbers, each with its protocol, are in {out}/metrics.json", flush=True)


def show(metrics: Mapping[str, Metric], sources: Mapping[str, Any], out: Path) -> None:
    """Writes OUT/<metric>.png for each metric that has something to show."""
    for name, metric in metrics.items():
        if isinstance(metric, Showing):
            judged, real = (lambda n, s=sources[k]: s.images(n, s.fields(n)) for k in (metric.of, metric.against))
            pictures = metric.show(judged, real).add(1).div(2).clamp(0, 1)
            grid = make_grid(pictures, nrow=len(pictures) // 2, padding=1, pad_value=1.0)
            write_whole(out / f"{name}.png", lambda path, grid=grid: save_image(grid, path, format="png"))


def code_version() -> str:
    """The commit that measured, with `+` where files were changed since; the package's version where there is no repository."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return f"{commit}{'+' if changed else ''}" if commit else version("ldm")
