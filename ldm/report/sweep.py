"""Sweeps: an evaluation under many settings, and the page about all of them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from html import escape
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.metrics import shown
from ldm.report.page import code, curves, page, table, wall

LOWER = re.compile(r"(r?fid|fd_\w+|kid|lpips)$")  # the less, the better
HIGHER = re.compile(r"(clip_score|\w+_top1|class(?:ifier)?_accuracy|\w*miou)$")
COLUMNS = 8  # pictures shown of each setting


@dataclass(frozen=True)
class Setting:
    """One setting of a sweep: its `name=value` words, the entries of its metrics.json, its first pictures, (N, 3, h, w) in
    [-1, 1].
    """

    words: Sequence[str]
    numbers: Mapping[str, Any]
    pictures: Tensor | None = None

    @property
    def values(self) -> dict[str, str]:
        """-> the values by name."""
        return dict(word.split("=", 1) for word in self.words)


def settings(sweep: str) -> list[list[str]]:
    """`guidance.scale=1,2 sampler=ddim,dpmpp` -> every combination, [name=value, ...]; the last name varies fastest.

    A pattern such as model=RUN/checkpoints/*.ckpt stands for the files that it matches.

    Raises:
        Refusal: a word that is no name=value,value.
    """
    choices: dict[str, list[str]] = {}
    for word in sweep.split():
        name, _, values = word.partition("=")
        chosen = [v for value in re.split(r",(?![^\[({]*[\])}])", values) for v in (sorted(glob(value)) or [value])]
        if not name or not values or "" in chosen:
            raise Refusal(f"sweep: {word!r} is no name=value,value, such as sweep='guidance.scale=1,2,4 sampler=ddim,dpmpp'.")
        choices[name] = [f"{name}={value}" for value in chosen]
    if not choices:
        raise Refusal("sweep names no settings; wanted something like sweep='guidance.scale=1,2,4 sampler=ddim,dpmpp'.")
    return [list(words) for words in itertools.product(*choices.values())]


def name_of(setting: Sequence[str]) -> str:
    """-> the name of a setting's folder."""
    pairs = [word.split("=", 1) for word in setting]
    return "_".join(re.sub(r"[^\w.+-]+", "-", f"{name.split('.')[-1]}-{_short(value)}") for name, value in pairs)


def sweep_page(results: Sequence[Setting], captions: Sequence[str], model: str | None = None) -> str:
    """-> the page of a sweep, HTML: a table, quality against agreement with the request, curves over numbers, pictures.

    `captions` are those of the first pictures, in order; `model`, what was measured where no setting says it.
    """
    names, numbers = _columns(results)
    header, rows = sweep_table(results)
    count = next(iter(results[0].numbers.values()))["protocol"]["count"]
    low, high = _axes(numbers)
    front = f"Best: no other setting is as good in both {high} and {low}, and better in one."
    lines = [front] if any(row[-1] for row in rows) else []
    lines += dict.fromkeys(e["note"] for s in results for e in s.numbers.values() if "note" in e)
    return page(
        "Latent diffusion: a sweep",
        f"{len(results)} settings, {count:,} pictures of each, the same requests and seeds for all.",
        [
            ("Numbers", table(header, rows) + f'<p class="soft"><br>{"<br>".join(lines)}</p>'),
            ("Quality against agreement with the request", _trade(results, names, numbers)),
            ("Over each setting", _over(results, names, numbers)),
            ("Pictures", _walls(results, names, captions)),
            ("Protocol", table(("field", "value"), _protocol(results))),
            ("Go on from here", code(_commands(results, numbers, model))),
        ],
    )


def sweep_table(results: Sequence[Setting]) -> tuple[list[str], list[list[str]]]:
    """-> a header and a row for each setting: its values that differ, its numbers, and whether it is on the Pareto front."""
    names, numbers = _columns(results)
    best = pareto(results, *_axes(numbers))
    rows = [
        [*(_short(s.values[n]) for n in names), *(shown(s.numbers[n]) for n in numbers), "best" if i in best else ""]
        for i, s in enumerate(results)
    ]
    return [*names, *numbers, ""], rows


def pareto(results: Sequence[Setting], low: str | None, high: str | None) -> set[int]:
    """-> the places of the settings on the Pareto front: no other is better in one number and at least as good in the other.

    `low` names the number of which less is better, `high` the other; with None for one of them there is no front.
    """
    if low is None or high is None:
        return set()
    points = [(s.numbers[low]["value"], -s.numbers[high]["value"]) for s in results]
    return {i for i, p in enumerate(points) if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}


def _commands(results: Sequence[Setting], numbers: Sequence[str], model: str | None) -> list[str]:
    """How pictures are drawn as with the best setting, by the first number that has a better end; none without a model."""
    number = next((n for n in numbers if LOWER.match(n) or HIGHER.match(n)), None)
    if number is None:
        return []
    best = (min if LOWER.match(number) else max)(results, key=lambda setting: setting.numbers[number]["value"])
    place = best.values.get("model", model)
    words = [word for word in best.words if word.startswith(("sampler", "guidance"))]
    if place is None:
        return []
    said = [f"model={quote(place)}", *(f"{name}={quote(value)}" for name, value in (word.split("=", 1) for word in words))]
    return [
        f"# as the setting with the best {number}, {shown(best.numbers[number])}",
        f"python sample.py {' '.join(said)} prompt='...' out=samples",
        "# in the browser",
        f"python -m ldm draw {said[0]}",
    ]


def _columns(results: Sequence[Setting]) -> tuple[list[str], list[str]]:
    """-> the settings that differ, or all where none does, and the numbers."""
    names = [name for name in results[0].values if len({s.values[name] for s in results}) > 1] or list(results[0].values)
    return names, list(dict.fromkeys(name for setting in results for name in setting.numbers))


def _axes(numbers: Sequence[str]) -> tuple[str | None, str | None]:
    return next(filter(LOWER.match, numbers), None), next(filter(HIGHER.match, numbers), None)


def _trade(results: Sequence[Setting], names: Sequence[str], numbers: Sequence[str]) -> str:
    """The lower-is-better number over the higher-is-better one; a line joins the values of the sweep's first name."""
    low, high = _axes(numbers)
    if low is None or high is None or len(results) < 2:
        return ""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for setting in results:
        line = series.setdefault(_label(setting, names[1:]), ([], []))
        line[0].append(setting.numbers[high]["value"])
        line[1].append(setting.numbers[low]["value"])
    words = f"Down and to the right is better. Each line goes through {names[0]} = {', '.join(_distinct(results, names[0]))}."
    return f"<p>{escape(words)}</p>{curves(series, high, low)}"


def _over(results: Sequence[Setting], names: Sequence[str], numbers: Sequence[str]) -> str:
    drawings = []
    for name in names:
        values = [_number(s.values[name]) for s in results]
        if len(set(values)) < 2 or None in values:
            continue
        others = [n for n in names if n != name]
        for number in (n for n in numbers if not n.endswith("_std")):
            series: dict[str, tuple[list[float], list[float]]] = {}
            for setting, value in sorted(zip(results, values), key=lambda pair: pair[1]):
                line = series.setdefault(_label(setting, others), ([], []))
                line[0].append(value)
                line[1].append(setting.numbers[number]["value"])
            label = "step" if name == "model" else name
            drawings.append(f"<figure><h3>{number} over {escape(label)}</h3>{curves(series, label, number)}</figure>")
    return f'<div class="charts">{"".join(drawings)}</div>' if drawings else ""


def _walls(results: Sequence[Setting], names: Sequence[str], captions: Sequence[str]) -> str:
    walls = []
    for setting in results:
        if setting.pictures is not None and len(setting.pictures):
            few = setting.pictures[:COLUMNS]
            zoom = max(1, 96 // few.shape[-1])
            words = list(captions[: len(few)]) or [""] * len(few)
            walls.append(f"<h3>{escape(_label(setting, names))}</h3>{wall(few, words, zoom=zoom)}")
    return "".join(walls)


def _protocol(results: Sequence[Setting]) -> list[tuple[str, str]]:
    """The fields that all numbers of all settings share."""
    protocols = [_flat(entry["protocol"]) for s in results for entry in s.numbers.values()]
    return [(name, str(value)) for name, value in protocols[0].items() if all(p.get(name) == value for p in protocols)]


def _flat(node: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {place: node}
    return {name: value for key, below in node.items() for name, value in _flat(below, f"{place}.{key}".strip(".")).items()}


def _label(setting: Setting, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_short(setting.values[name])}" for name in names) or "all"


def _distinct(results: Sequence[Setting], name: str) -> list[str]:
    return list(dict.fromkeys(_short(s.values[name]) for s in results))


def _short(value: str) -> str:
    return Path(value).stem if "/" in value else value


def _number(value: str) -> float | None:
    """-> a setting's value as a number: itself, or the step in a checkpoint's name; None where it is neither."""
    try:
        return float(value)
    except ValueError:
        step = re.search(r"(\d+)$", Path(value).stem)
        return float(step[1]) if step else None


def grid(pictures: Tensor) -> Tensor:
    """(N, 3, h, w) in [-1, 1] -> the first COLUMNS side by side, (3, h, ...) in [0, 1]."""
    return torch.cat(list(pictures[:COLUMNS]), dim=2).add(1).div(2).clamp(0, 1)
