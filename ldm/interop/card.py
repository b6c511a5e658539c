"""The page that travels with a model: what it is, what it was trained on, how it was measured, under which licence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.interop.bundle import Bundle


def card(bundle: Bundle, layout: str, licence: str, source: str) -> str:
    """A model card in Markdown; what lies beside the source (config.yaml, evaluation/metrics.json) is told in it."""
    folder = Path(source) if source else Path()
    metrics, config = folder / "evaluation" / "metrics.json", folder / "config.yaml"
    numbers = json.loads(metrics.read_text()) if source and metrics.is_file() else {}
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
    lines += [f"- {name}: {value:.4g}" for name, value in numbers.items() if isinstance(value, int | float)]
    lines += [] if numbers else ["Nothing was measured."]
    return "\n".join(lines) + "\n"


def _short(node: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in node.items() if not k.startswith("_"))
    return f"{node['_target_'].split('.')[-1]}({settings})"
