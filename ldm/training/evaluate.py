"""Reconstructs, draws and measures: what evaluate.py and the quickstart do."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.generate import generate
from ldm.model import LatentModel
from ldm.types import Batch, Guidance, Metric, Sampler


@torch.no_grad()
def evaluate(
    model: LatentModel,
    data: Any,
    metrics: Mapping[str, Metric],
    sampler: Sampler,
    guidance: Guidance,
    count: int,
    seed: int,
    batch: int,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """-> the metrics' numbers, and the pictures that they judged: `reconstruction`, `drawing`, each (N, 3, h, w) in [-1, 1].

    Reconstructions are of all validation pictures; drawings of `count` evenly chosen training captions, picture i from
    seed + i.

    Raises:
        ValueError: there are fewer captions than pictures asked for, or no validation pictures.
    """
    device = next(model.denoiser.parameters()).device
    sources = {
        "reconstruction": lambda: _reconstruct(model, data, batch, device),
        "drawing": lambda: _draw(model, data, sampler, guidance, count, seed, batch, device),
    }
    pictures: dict[str, Tensor] = {}
    for source in dict.fromkeys(metric.of for metric in metrics.values()):
        judges = [metric for metric in metrics.values() if metric.of == source]
        for metric in judges:
            metric.prepare(data)
        drawn = []
        for images, asked in sources[source]():
            drawn.append(images.float().cpu())
            for metric in judges:
                metric.update(images, asked)
        pictures[source] = torch.cat(drawn)
    numbers: dict[str, float] = {}
    for metric in metrics.values():
        numbers |= metric.compute()
    return numbers, pictures


def chosen(data: Any, count: int) -> list[int]:
    """`count` evenly chosen training samples.

    Raises:
        ValueError: there are not that many.
    """
    total = len(data.train_set)
    if count > total:
        raise ValueError(
            f"count={count} pictures were asked for, but there are only {total} training captions; use count={total}."
        )
    return torch.linspace(0, total - 1, count).round().long().tolist()


def _reconstruct(model: LatentModel, data: Any, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Batch]]:
    if not data.val_set:
        raise ValueError(
            "Reconstruction is measured on validation pictures, and data.val is empty; name shards with data.val=PATH."
        )
    for asked in tqdm(data.ordered("val", batch=batch), desc="reconstructing"):
        asked = data.on_after_batch_transfer(data.transfer_batch_to_device(asked, device, 0), 0)
        yield model.autoencoder.decode(model.autoencoder.encode(asked["image"]).mean).clamp(-1, 1), asked


def _draw(
    model: LatentModel, data: Any, sampler: Sampler, guidance: Guidance, count: int, seed: int, batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Batch]]:
    rows = chosen(data, count)
    for start in tqdm(range(0, count, batch), desc="drawing"):
        part = rows[start : start + batch]
        asked = data.rows("train", part)
        asked = data.on_after_batch_transfer(data.transfer_batch_to_device(asked, device, 0), 0)
        size = tuple(asked["image"].shape[2:])
        yield generate(model, asked, sampler, guidance, range(seed + start, seed + start + len(part)), size), asked
