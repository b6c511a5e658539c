"""The quickstart's report: what was drawn, how good it is, how long it took, and how to go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.folder import write_text
from ldm.report import code, curves, page, previews, read_curves, stacked_bar, table, tiles, wall

MEANING = {
    "reconstruction_psnr": "PSNR of the autoencoder on held-out pictures, in dB (bar 24, aim 26).",
    "text_match_top1": "For 128 evenly chosen training captions: the nearest training picture, after pooling to 16x16, is the "
    "one that the caption names (bar 0.60, aim 0.90). A test of conditioning, not of generalisation.",
    "clip_retrieval_top1": "For the same pictures: the quickstart's own CLIP finds the caption among all 128 (chance 0.008).",
}
ABOVE = "<p>Above the real picture, below the drawn one.</p>"
GO_ON = [
    "make quickstart MINUTES=30",
    "python sample.py model=runs/quickstart/diffusion prompt='[red apple,fox]' seed=0 out=samples guidance.scale=3",
    "python evaluate.py model=runs/quickstart/diffusion out=runs/evaluation",
    "python train.py experiment=emoji/text data=latents trainer.max_steps=20000",
    "python train.py experiment=emoji/text data=shards data.train=/path/to/shards data.size=32",
    "tensorboard --logdir runs/quickstart",
]


def write_report(folder: Path, metrics: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Writes FOLDER/report.html.

    metrics: what metrics.json holds. shown: pictures in [-1, 1]: held_out, reconstructed (N, 3, h, w); real, drawn
    (M, 3, h, w) with captions and matched; samples (K, 3, h, w) with prompts.
    """
    pairs = torch.stack((shown["real"], shown["drawn"].to(shown["real"])), dim=1)
    both = torch.stack((shown["held_out"], shown["reconstructed"].to(shown["held_out"])), dim=1)
    sections = [
        ("Measured", _headline(metrics)),
        (
            "Drawn from a caption",
            f"<p>Above the real picture, below the drawn one.</p>{wall(pairs, shown['captions'], shown['matched'])}",
        ),
        ("Drawn from words in a new order", wall(shown["samples"], shown["prompts"])),
        ("Held-out pictures, and their reconstructions", wall(both[:32], [""] * min(32, len(both)))),
        ("As training went on", previews(folder / "diffusion")),
        ("Losses", _losses(folder)),
        ("Measurements", table(("figure", "value", "what it means"), _numbers(metrics))),
        ("Seconds", _seconds(metrics["seconds"])),
        ("Made with", table(("what", "value"), _surroundings(metrics))),
        ("Go on from here", code(GO_ON)),
    ]
    lead = f"A CLIP, an autoencoder and a diffusion model, trained on emoji in {metrics['seconds']['total'] / 60:.1f} minutes."
    write_text(page("Quickstart", lead, sections), folder / "report.html")


def _headline(metrics: Mapping[str, Any]) -> str:
    psnr, match, retrieval = (metrics[name] for name in MEANING)
    return tiles(
        [
            ("reconstruction", f"{psnr:.1f} dB", "bar 24, aim 26", psnr >= 24),
            ("text match", f"{match:.2f}", "bar 0.60, aim 0.90", match >= 0.6),
            ("CLIP retrieval", f"{retrieval:.2f}", "chance 0.008", retrieval > 0.1),
            ("minutes", f"{metrics['seconds']['total'] / 60:.1f}", "bar 10, all stages", metrics["seconds"]["total"] <= 600),
        ]
    )


def _losses(folder: Path) -> str:
    drawings = []
    for stage in ("clip", "autoencoder", "diffusion"):
        found = {name: points for name, points in read_curves(folder / stage).items() if name in ("train/loss", "val/loss")}
        if found:
            drawings.append(f"<h3>{stage}</h3>{curves(found, 'step')}")
    psnr = {name: points for name, points in read_curves(folder / "autoencoder").items() if name == "val/psnr"}
    return "".join(drawings) + curves(psnr, "step")


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, f"{metrics[name]:.4f}", meaning) for name, meaning in MEANING.items()]


def _seconds(seconds: Mapping[str, float]) -> str:
    parts = {name: value for name, value in seconds.items() if name != "total"}
    return stacked_bar(parts) + table(("stage", "seconds"), [(name, f"{value:.1f}") for name, value in seconds.items()])


def _surroundings(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(value)) for name, value in metrics["hardware"].items() if value is not None]
    rows += [
        (f"{stage}: parameters, steps", f"{count:,}, {metrics['steps'][stage]:,}")
        for stage, count in metrics["parameters"].items()
    ]
    return [*rows, ("commit", str(metrics["commit"]))]
