"""Self-contained HTML pages of pictures, curves and numbers: one file, no scripts, nothing to load from elsewhere."""

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

Curves = dict[str, tuple[list[float], list[float]]]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #6b7280; --line: #d9dde3; --back: #ffffff; --card: #f5f6f8;
  --good: #15803d; --bad: #b45309 }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa3af; --line: #343a43; --back: #14171b;
  --card: #1e2228; --good: #4ade80; --bad: #fbbf24 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem }
p.lead, figcaption, .soft { color: var(--soft) }
img { image-rendering: pixelated; max-width: 100%; background: #fff; border-radius: 4px }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem }
.tile { background: var(--card); border-radius: 10px; padding: .8rem 1.1rem; min-width: 9rem }
.tile b { display: block; font-size: 1.6rem }
.good { color: var(--good) }
.bad { color: var(--bad) }
.wall { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.6rem, 1fr)); gap: .7rem .5rem }
.wall figure, .row figure { margin: 0; font-size: .72rem; line-height: 1.25; text-align: center }
.wall img { width: 100%; max-width: 96px }
.row { display: flex; gap: .8rem; overflow-x: auto }
.row img { width: 17rem; max-width: none }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { font-variant-numeric: tabular-nums }
pre { background: var(--card); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; font-size: .85rem }
.bar { display: flex; height: 1.3rem; border-radius: 6px; overflow: hidden; margin: .4rem 0 1rem }
svg { max-width: 100%; height: auto }
"""
HUES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page; title, lead and headings are text, the sections' bodies HTML. Sections with an empty body are left out."""
    body = "".join(f"<h2>{html.escape(head)}</h2>\n{part}\n" for head, part in sections if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>\n{body}</body></html>\n'
    )


def picture(images: Tensor, alt: str = "") -> str:
    """images: (3, h, w) or (N, 3, h, w) in [-1, 1], stacked above each other -> an <img> with the pixels in it."""
    rows = images if images.ndim == 3 else torch.cat(list(images), dim=1)
    stream = io.BytesIO()
    to_pil_image(rows.float().cpu().add(1).div(2).clamp(0, 1).mul(255).round().byte()).save(stream, "PNG")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def wall(images: Tensor, captions: Sequence[str], marks: Sequence[bool] | None = None) -> str:
    """images: (N, 3, h, w), or (N, k, 3, h, w) for k above each other, each with its caption, and a mark where asked for."""
    marked = (
        [""] * len(captions) if marks is None else [' <b class="good">✓</b>' if m else ' <b class="bad">✗</b>' for m in marks]
    )
    cells = (f"<figure>{picture(x, c)}<br>{html.escape(c)}{m}</figure>" for x, c, m in zip(images, captions, marked))
    return f'<div class="wall">{"".join(cells)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text and numbers in rows."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def code(lines: Sequence[str]) -> str:
    """Commands, one a line."""
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def curves(series: Curves, x_label: str) -> str:
    """Lines by name -> inline SVG, readable on light and dark."""
    if not series:
        return ""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    gray = "#808893"
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    for hue, (name, (steps, values)) in zip(HUES * len(series), series.items()):
        axes.plot(steps, values, label=name, color=hue, linewidth=1.6)
    axes.set_xlabel(x_label, color=gray)
    axes.tick_params(colors=gray)
    axes.grid(alpha=0.25)
    for spine in axes.spines.values():
        spine.set_color(gray)
    axes.legend(frameon=False, labelcolor=gray)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True)
    plt.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def read_curves(run: Path) -> Curves:
    """All columns of the CSV logs of a run, csv/version_*/metrics.csv: name -> (steps, values); a later version wins a step."""
    values: dict[str, dict[float, float]] = {}
    logs = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    for log in logs:
        with open(log, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    if cell and name not in ("step", "epoch"):
                        values.setdefault(name, {})[float(row["step"])] = float(cell)
    return {name: (sorted(points), [points[s] for s in sorted(points)]) for name, points in values.items()}


def previews(run: Path, most: int = 5) -> str:
    """Pictures drawn as training went on, from RUN/previews/<step>.png: the first, some in between, the last."""
    files = sorted(run.glob("previews/*.png"))
    chosen = [files[round(i * (len(files) - 1) / max(most - 1, 1))] for i in range(min(most, len(files)))]
    cells = []
    for file in chosen:
        data = base64.b64encode(file.read_bytes()).decode()
        size = Image.open(file).size
        cells.append(
            f'<figure><img alt="step {int(file.stem)}" width="{size[0]}" src="data:image/png;base64,{data}">'
            f"<figcaption>step {int(file.stem)}</figcaption></figure>"
        )
    return f'<div class="row">{"".join(cells)}</div>' if cells else ""


def stacked_bar(parts: Mapping[str, float]) -> str:
    """Shares of a whole, as one coloured bar."""
    cells = (
        f'<span title="{html.escape(name)}: {value:g} s" style="flex:{value};background:{hue}"></span>'
        for hue, (name, value) in zip(HUES * len(parts), parts.items())
    )
    return f'<div class="bar">{"".join(cells)}</div>'


def tiles(rows: Sequence[tuple[str, str, str, bool]]) -> str:
    """Headline numbers: (name, number, what it is held against, whether it holds)."""
    cells = (
        f'<div class="tile"><span class="soft">{html.escape(name)}</span>'
        f'<b class="{"good" if good else "bad"}">{html.escape(number)}</b><span class="soft">{html.escape(beside)}</span></div>'
        for name, number, beside, good in rows
    )
    return f'<div class="tiles">{"".join(cells)}</div>'
