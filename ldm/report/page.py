"""Self-contained HTML pages of pictures, curves, numbers: no scripts, nothing from elsewhere; a click enlarges a picture."""

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ldm.errors import Refusal

Curves = dict[str, tuple[list[float], list[float]]]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5f6875; --line: #d9dde3; --back: #fff; --card: #f4f5f7;
  --good: #15803d; --bad: #b45309 }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa3af; --line: #343a43; --back: #14171b;
  --card: #1e2228; --good: #4ade80; --bad: #fbbf24 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 71rem;
  margin: 2rem auto 4rem; padding: 0 1rem }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line) }
section:first-of-type h2 { border-top: 0; margin-top: 1rem; padding-top: 0 }
h3 { text-align: left; font-size: .95rem; font-weight: 600; margin: .8rem 0 .2rem }
p { margin: 0 0 .9rem; max-width: 46rem }
p.lead, figcaption, .soft { color: var(--soft) }
figure { margin: 0; text-align: center }
figure p { text-align: left }
figcaption { font-size: .75rem; line-height: 1.3; margin-top: .3rem; overflow-wrap: anywhere }
img { image-rendering: pixelated; max-width: 100%; height: auto; background: #fff; border-radius: 4px; vertical-align: top }
.tiles, .row { display: flex; flex-wrap: wrap; gap: .8rem }
.tile { background: var(--card); border-radius: 10px; padding: .8rem 1.1rem; flex: 1 1 11rem; max-width: 18rem }
.tile b { display: block; font-size: 1.7rem; line-height: 1.3 }
.tile span { display: block; font-size: .85rem }
.good { color: var(--good) } .bad { color: var(--bad) }
.wall { display: grid; gap: 1rem .6rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: .5rem 1.5rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem }
td, th { text-align: left; padding: .4rem 1.6rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td { font-variant-numeric: tabular-nums; min-width: 5rem }
@media (min-width: 40rem) { td:first-child { white-space: nowrap } }
@media (max-width: 40rem) { td, th { padding-right: .8rem } td { min-width: 0 } .tile { max-width: none }
  pre { white-space: pre-wrap; overflow-wrap: anywhere } pre code { padding-left: 1.2rem; text-indent: -1.2rem } }
img[tabindex] { cursor: zoom-in }
img[tabindex]:focus { position: fixed; inset: 0; margin: auto; z-index: 9; width: 96vw; height: 96vh; max-width: none;
  object-fit: contain; background: none; box-shadow: 0 0 0 100vmax rgb(0 0 0 / .85); outline: 0; pointer-events: none }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; margin-bottom: 1rem }
nav a { color: var(--soft) }
pre { background: var(--card); padding: .9rem 1.1rem; border-radius: 10px; overflow-x: auto; font-size: .85rem }
pre code { display: block; user-select: all; -webkit-user-select: all; cursor: copy }
.bar { display: flex; height: 1.4rem; border-radius: 6px; overflow: hidden; margin: .4rem 0 .6rem }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem; margin-bottom: 1rem }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .4rem }
svg { width: 100%; max-width: 44rem; height: auto; display: block }
"""
PREVIEWS = 4
HUES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")
GREY = "#808893"  # an axis of this grey is readable on white and on black


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """-> a whole page, HTML. Title, lead and headings are plain text, bodies HTML; sections with an empty body are left out."""
    shown = [(f"part-{i}", head, part) for i, (head, part) in enumerate(sections) if part]
    body = "".join(f'<section id="{i}"><h2>{html.escape(head)}</h2>\n{part}\n</section>\n' for i, head, part in shown)
    links = "".join(f'<a href="#{i}">{html.escape(head)}</a>' for i, head, _ in shown)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>\n<nav>{links}</nav>\n{body}</body></html>\n'
    )


def picture(images: Tensor, columns: int = 1, zoom: int = 1, alt: str = "") -> str:
    """images: (3, h, w) or (N, 3, h, w) in [-1, 1], `columns` to a row -> an <img> of these pixels, enlarged `zoom` times."""
    pixels = images.reshape(-1, *images.shape[-3:]).float().cpu().add(1).div(2).clamp(0, 1).mul(255).round().byte()
    stream = io.BytesIO()
    to_pil_image(make_grid(pixels, nrow=columns, padding=0)).save(stream, "PNG")
    return _img(stream.getvalue(), zoom, alt)


def wall(images: Tensor, captions: Sequence[str], marks: Sequence[bool] | None = None, zoom: int = 3) -> str:
    """images: (N, 3, h, w), or (N, k, 3, h, w) for k above each other, in [-1, 1], with captions, and with `marks` a tick or
    cross each -> HTML.

    Raises:
        Refusal: there are not as many captions (or marks) as pictures.
    """
    for name, given in (("captions", captions), ("marks", marks)):
        if given is not None and len(given) != len(images):
            raise Refusal(f"wall() got {len(images)} pictures and {len(given)} {name}; each picture takes one")
    marked = [""] * len(captions) if marks is None else [_mark(m) for m in marks]
    cells = (
        f"<figure>{picture(x, zoom=zoom, alt=c)}<figcaption>{html.escape(c)}{m}</figcaption></figure>"
        for x, c, m in zip(images, captions, marked)
    )
    wide = images.shape[-1] * zoom
    columns = f"repeat(auto-fill, minmax(min({wide}px, max(22%, 4rem)), 1fr))"  # on a phone four beside each other
    return f'<div class="wall" style="grid-template-columns: {columns}">{"".join(cells)}</div>' if len(images) else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text and numbers in rows -> an HTML table; nothing without rows."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>' if rows else ""


def code(lines: Sequence[str]) -> str:
    """Commands, one a line, and comments behind a # -> HTML in which a click selects a whole command."""
    return f"<pre>{''.join(_line(line) for line in lines)}</pre>"


def curves(series: Mapping[str, tuple[list[float], list[float]]], x_label: str, y_label: str = "", log_y: bool = False) -> str:
    """Lines by name, (x, y) each -> inline SVG, readable on light and dark; short lines show their points."""
    if not series:
        return ""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(5.4, 3), layout="constrained")
    axes = figure.subplots()
    for hue, (name, (steps, values)) in zip(HUES * len(series), series.items()):
        few = "o" if len(steps) <= 20 else None
        axes.plot(steps, values, label=name, color=hue, linewidth=1.6, marker=few, markersize=3.5)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(x_label, color=GREY)
    axes.set_ylabel(y_label, color=GREY)
    axes.tick_params(which="both", colors=GREY, labelsize=9)
    axes.grid(alpha=0.25, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=9)
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def read_curves(run: Path) -> Curves:
    """A run's folder -> the columns of its CSV logs, csv/version_*/metrics.csv: name -> (steps, values). Where two versions have
    the same step, the later one counts.
    """
    values: dict[str, dict[float, float]] = {}
    logs = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    for log in logs:
        with open(log, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    if row.get("step") and name and cell and name not in ("step", "epoch"):
                        values.setdefault(name, {})[float(row["step"])] = float(cell)
    return {name: (sorted(points), [points[s] for s in sorted(points)]) for name, points in values.items()}


def previews(run: Path) -> str:
    """-> HTML with at most PREVIEWS of the pictures in RUN/previews/<step>.png: the first, some in between, the last."""
    files = sorted(run.glob("previews/*.png"))
    count = min(PREVIEWS, len(files))
    chosen = [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)]
    cells = "".join(
        f"<figure>{_img(file.read_bytes(), 2, f'step {int(file.stem)}')}<figcaption>step {int(file.stem):,}</figcaption></figure>"
        for file in chosen
    )
    return f'<div class="row">{cells}</div>' if cells else ""


def stacked_bar(parts: Mapping[str, float]) -> str:
    """Seconds by name -> HTML, one coloured bar and its legend."""
    hues = HUES * len(parts)
    cells = "".join(f'<span style="flex:{value:g};background:{hue}"></span>' for hue, value in zip(hues, parts.values()))
    names = "".join(
        f'<span><i style="background:{hue}"></i>{html.escape(name)} {value:g} s</span>'
        for hue, (name, value) in zip(hues, parts.items())
    )
    return f'<div class="bar">{cells}</div><div class="legend">{names}</div>' if parts else ""


def tiles(rows: Sequence[tuple[str, str, str, bool | None]]) -> str:
    """Headline numbers -> HTML: (name, number, what it is compared with, whether it is good enough; None where nothing is)."""
    cells = (
        f'<div class="tile"><span class="soft">{html.escape(name)}</span>'
        f'<b class="{"" if good is None else "good" if good else "bad"}">{html.escape(number)}</b>'
        f'<span class="soft">{html.escape(beside)}</span></div>'
        for name, number, beside, good in rows
    )
    return f'<div class="tiles">{"".join(cells)}</div>' if rows else ""


def _line(line: str) -> str:
    escaped = html.escape(line)
    return f'<span class="soft">{escaped}</span>' if line.startswith("#") else f"<code>{escaped}</code>"


def _img(png: bytes, zoom: int, alt: str) -> str:
    wide, high = (side * zoom for side in Image.open(io.BytesIO(png)).size)
    data = base64.b64encode(png).decode()
    return f'<img tabindex="0" alt="{html.escape(alt)}" width="{wide}" height="{high}" src="data:image/png;base64,{data}">'


def _mark(match: bool) -> str:
    kind, said, sign = ("good", "match", chr(0x2713)) if match else ("bad", "no match", chr(0x2717))
    return f'&nbsp;<b class="{kind}" title="{said}">{sign}</b>'
