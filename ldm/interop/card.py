"""The page that travels with a model: what it is, what it was trained on, how it was measured, under which licence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.files.folder import read_recipe
from ldm.files.metrics import NAME, read_metrics, shown


def card(recipe: Mapping[str, Any] | None, layout: str, licence: str, source: str, origin: str = "") -> str:
    """A model card in Markdown; what lies beside the source (config.yaml, evaluation/metrics.json) is told in it.

    Args:
        recipe: of a latent model or an adapter; None for any other.
        layout: of the files, or the library that reads them.
        licence: as Hugging Face's model cards name it, such as `mit`, or `unknown`.
        source: the folder that the model was read from; empty where it was none.
        origin: where the model comes from, a sentence.
    """
    folder = Path(source) if source else Path()
    config = folder / "config.yaml"
    lines = ["---", f"license: {licence}", f"library_name: {layout}", "---", "", f"# {folder.name or 'model'}", "", origin, ""]
    if recipe is not None:
        lines += [f"- {name}: `{_short(recipe[name])}`" for name in ("backbone", "schedule", "prediction") if name in recipe]
        lines += [f"- conditions: {', '.join(recipe['condition']) or 'none'}"] if "condition" in recipe else []
    lines += ["", "## Training", ""]
    if source and config.is_file():
        lines += ["```yaml", config.read_text().rstrip(), "```"]
    else:
        lines += ["Not recorded with the source."]
    lines += ["", "## Measured", ""]
    measured = _newest(folder / "evaluation") if source else None
    lines += ["Nothing was measured."] if measured is None else _measured(measured)
    return "\n".join(lines) + "\n"


def of_run(folder: Path) -> str:
    """The card of a finished run, whatever its stage trained."""
    recipe = read_recipe(folder) if (folder / "config.json").is_file() else None
    return card(recipe, "ldm", "unknown", str(folder), "Trained with ldm.")


def _newest(evaluation: Path) -> Path | None:
    """What an evaluation of the model itself says, or else the last one while it was trained (callback=evaluate)."""
    there = [evaluation / NAME, *sorted(evaluation.glob(f"*/{NAME}"), reverse=True)]
    return next(filter(Path.is_file, there), None)


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
