"""The page that travels with a model: what it is, what it was trained on, how it was measured, under which licence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.files.metrics import NAME, read_metrics, shown
from ldm.interop.bundle import Bundle


def card(bundle: Bundle, layout: str, licence: str, source: str) -> str:
    """A model card in Markdown; what lies beside the source (config.yaml, evaluation/metrics.json) is told in it."""
    folder = Path(source) if source else Path()
    metrics, config = folder / "evaluation" / NAME, folder / "config.yaml"
    lines = ["---", f"license: {licence}", f"library_name: {layout}", "---", "", f"# {folder.name or 'model'}", ""]
    lines += [f"Converted from `{source}` to the layout of {layout}." if source else "", ""]
    if bundle.recipe is not None:
        lines += [f"- {name}: `{_short(bundle.recipe[name])}`" for name in ("backbone", "schedule", "prediction")]
        lines += [f"- conditions: {', '.join(bundle.recipe['condition']) or 'none'}"]
    lines += ["", "## Training", ""]
    if source and config.is_file():
        lines += ["```yaml", config.read_text().rstrip(), "```"]
    else:
        lines += ["Not recorded with the source."]
    lines += ["", "## Measured", ""]
    lines += _measured(metrics) if source and metrics.is_file() else ["Nothing was measured."]
    return "\n".join(lines) + "\n"


def _measured(path: Path) -> list[str]:
    """Each number with its standard error, its note, and what of its protocol are plain words and numbers."""
    try:
        numbers = read_metrics(path)
    except Refusal as error:
        return [f"What was measured cannot be read: {error}"]
    lines = []
    for name, entry in numbers.items():
        plain = {k: v[:12] if k == "sha256" else v for k, v in entry["protocol"].items() if isinstance(v, str | int | float)}
        told = ", ".join(f"{key}: {value}" for key, value in plain.items())
        lines += [f"- **{name}: {shown(entry)}**", *([f"  - {entry['note']}"] if entry.get("note") else []), f"  - {told}"]
    return lines


def _short(node: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in node.items() if not k.startswith("_"))
    return f"{node['_target_'].split('.')[-1]}({settings})"
