"""The quickstart's report: what was drawn, how good it is, how long it took, and how to go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.files.folder import write_text
from ldm.report.page import Curves, code, curves, page, previews, read_curves, stacked_bar, table, tiles, wall

BARS = {"reconstruction_psnr": (24.0, 26.0), "text_match_top1": (0.60, 0.90)}  # bar and aim of the quickstart
MEASURES = {  # name: (title, unit, digits, what it means)
    "reconstruction_psnr": ("reconstruction PSNR", "\u00a0dB", 1, "How close the autoencoder comes to pictures it never saw."),
    "text_match_top1": (
        "text match",
        "",
        2,
        "For 128 evenly chosen training captions the nearest training picture after pooling to "
        "16x16 is the one the caption names: a test of conditioning, not of generalisation.",
    ),
    "clip_retrieval_top1": ("CLIP retrieval", "", 2, "The share of these drawings whose caption the run's own CLIP ranks first."),
}
GO_ON = """\
make quickstart MINUTES=30
python -m ldm draw model=runs/quickstart/diffusion
python sample.py model=runs/quickstart/diffusion prompt='[red apple,fox]' seed=0 out=samples
python evaluate.py model=runs/quickstart/diffusion
python train.py experiment=emoji/text trainer.max_steps=20000
# on pictures of your own: a folder with captions beside them, or shards (data=shards)
python train.py experiment=emoji/text data=folder data.train=/path/to/pictures data.size=64
# curves and previews in the browser
tensorboard --logdir runs/quickstart"""


def write_report(folder: Path, metrics: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Writes FOLDER/report.html, the page of `quickstart_page`."""
    write_text(quickstart_page(folder, metrics, shown), folder / "report.html")


def quickstart_page(folder: Path, metrics: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    """-> the quickstart's page, HTML: what was drawn, how good it is, how long it took, how to go on. Missing parts are left out.

    `folder` holds {clip,autoencoder,diffusion}/csv and {autoencoder,diffusion}/previews. `metrics` is metrics.json's content.
    `shown` are pictures in [-1, 1] by name: held_out, reconstructed (N, 3, h, w); real, drawn (M, 3, h, w) with captions and
    matched, lists of M; samples (K, 3, h, w) with prompts, a list of K.
    """
    seconds = metrics.get("seconds", {})
    parts = {name: value for name, value in seconds.items() if name != "total"}
    took = f" in {seconds['total'] / 60:.1f} minutes" if "total" in seconds else ""
    stages = [(name, f"{value:,.1f}", f"{value / max(sum(parts.values()), 1e-9):.0%}") for name, value in parts.items()]
    new = wall(shown["samples"], shown["prompts"], zoom=4) if "samples" in shown else ""
    return page(
        "Latent diffusion: the quickstart",
        f"A small CLIP, an autoencoder and a diffusion model, trained on emoji{took}, and what came of them.",
        [
            ("In short", _headline(metrics)),
            ("Drawn from captions of the training set", _from_captions(shown)),
            ("New prompts: combinations that are not in the data", new),
            ("Held-out pictures through the autoencoder", _held_out(shown)),
            ("As the diffusion model was trained", previews(folder / "diffusion")),
            ("As the autoencoder was trained", previews(folder / "autoencoder")),
            ("Curves", _stages(folder)),
            ("Measurements", table(("measurement", "value", "what it means"), _meanings(metrics))),
            ("Seconds per stage", stacked_bar(parts) + table(("stage", "seconds", "share"), stages)),
            ("Hardware and versions", table(("what", "value"), _surroundings(metrics))),
            ("Go on from here", code(GO_ON.splitlines())),
        ],
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str, str, bool | None]] = []
    for name, (bar, aim) in BARS.items():
        if (value := metrics.get(name)) is not None:
            title, unit, digits, _ = MEASURES[name]
            reached = "the aim is reached" if value >= aim else "the bar is reached" if value >= bar else "below the bar"
            beside = f"bar {bar:.{digits}f}, aim {aim:.{digits}f}: {reached}"
            rows.append((title, f"{value:.{digits}f}{unit}", beside, value >= bar))
    if "total" in metrics.get("seconds", {}):
        beside = f"steps meant for {metrics['minutes']:g} minutes" if "minutes" in metrics else "all stages"
        rows.append(("time", f"{metrics['seconds']['total'] / 60:.1f}\u00a0min", beside, None))
    return tiles(rows)


def _from_captions(shown: Mapping[str, Any]) -> str:
    if "drawn" not in shown:
        return ""
    marks = [bool(m) for m in shown["matched"]]
    text = "Above the real picture, below the drawn one; a tick where the training picture nearest to the drawing is the real one"
    walls = wall(_above(shown["real"], shown["drawn"]), shown["captions"], marks)
    return f"<p>{text}: {sum(marks)} of {len(marks)}.</p>{walls}"


def _held_out(shown: Mapping[str, Any]) -> str:
    if "reconstructed" not in shown:
        return ""
    both = _above(shown["held_out"], shown["reconstructed"])[:30]
    return f"<p>Above the original, below its reconstruction.</p>{wall(both, [''] * len(both))}"


def _above(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.stack((top.float().cpu(), bottom.float().cpu()), dim=1)


def _stages(folder: Path) -> str:
    drawings = []
    for stage in ("clip", "autoencoder", "diffusion"):
        logged = read_curves(folder / stage)
        for name, log_y in (("loss", True), ("psnr", False)):
            series = {full: logged[full] for full in (f"train/{name}", f"val/{name}") if full in logged}
            label = "PSNR in dB" if name == "psnr" else name
            lines = "".join(f'<p class="soft">{line}</p>' for line in climbs(logged) if name == "loss")
            figure = f"<figure><h3>{stage}: {label}</h3>{curves(series, 'step', label, log_y)}{lines}</figure>"
            drawings += [figure] if series else []
    return f'<div class="charts">{"".join(drawings)}</div>' if drawings else ""


def climbs(logged: Curves) -> list[str]:
    """-> a sentence about a validation loss that rises again while the training loss falls; nothing where it does not rise."""
    steps, losses = logged.get("val/loss", ([], []))
    train = logged.get("train/loss", ([], []))[1]
    if not losses or losses[-1] <= 1.02 * min(losses):
        return []
    lowest, falls = steps[losses.index(min(losses))], len(train) > 1 and train[-1] < train[0]
    why = "learns its training pictures by heart rather than what they have in common" if falls else "has gone astray"
    return [
        f"The validation loss is lowest at step {lowest:,.0f} ({min(losses):.3g}) and {losses[-1]:.3g} at the end: from there on "
        f"the network {why}. More pictures or fewer steps help; with as few as these it is to be expected."
    ]


def _meanings(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(*measure, metrics[name]) for name, measure in MEASURES.items() if metrics.get(name) is not None]
    return [(title, f"{value:.{digits + 1}f}{unit}", meaning) for title, unit, digits, meaning, value in rows]


def _surroundings(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(value)) for name, value in metrics.get("hardware", {}).items() if value is not None]
    rows += [(f"parameters: {stage}", f"{count:,}") for stage, count in metrics.get("parameters", {}).items()]
    rows += [(f"training steps: {stage}", f"{count:,}") for stage, count in metrics.get("steps", {}).items()]
    return rows + ([("commit", str(metrics["commit"]))] if metrics.get("commit") else [])
