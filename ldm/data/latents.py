"""Latents ahead of time: shards of moments, encoded once, with a record of what made them.

The record, `provenance.json` beside the shards, holds the sha256 of the autoencoder's weights, the fingerprint of the pictures'
shards, their size and the precision. Training on these shards with another autoencoder is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ldm.data.order import Place
from ldm.data.samples import Loaded
from ldm.data.write import write_shard
from ldm.types import Autoencoder

RECORD = "provenance.json"
REST = {"txt": "caption", "cls": "label", "json": "json"}  # what goes along: member -> field


@torch.no_grad()
def write_latents(
    autoencoder: nn.Module,
    data: Any,
    split: str,
    folder: Path,
    batch: int,
    device: Any,
    per_shard: int = 1000,
    half: bool = False,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Encodes a split of a data module into shards; goes on where it stopped. Rank r writes shard r, r + world, ...

    A sample is moments.npy (2C, H, W), the whitened mean above the standard deviation, as float32 or float16; its caption, label
    and record as they were.

    Raises:
        ValueError: the folder holds latents of something else.
    """
    samples = {"train": data.train_set, "val": data.val_set}[split]
    record = {**about(autoencoder, half), "pictures": samples.index.fingerprint(), "size": data.size, "count": len(samples)}
    _claim(folder, record | {"filters": data.filters, "per_shard": per_shard})
    numbers = range(rank, math.ceil(len(samples) / per_shard), world)
    for number in tqdm(numbers, desc=f"{split} latents", unit="shard", disable=rank > 0):
        path = folder / f"{number:05d}.tar"
        if not path.is_file():
            rows = range(number * per_shard, min((number + 1) * per_shard, len(samples)))
            write_shard(_moments_of(autoencoder, data, samples, rows, batch, device, half), path)


def about(autoencoder: nn.Module, half: bool = False) -> dict[str, Any]:
    """What made the latents: the autoencoder's weights, as a hash, and the precision."""
    return {"autoencoder": weights_hash(autoencoder), "precision": "float16" if half else "float32"}


def weights_hash(module: nn.Module) -> str:
    """-> sha256, in hex, over the names, shapes and numbers of a module's weights and statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_provenance(source: Any, stage: Any) -> None:
    """Compares the latents that a stage is to be trained on with the autoencoder that its model has, where it has one loaded.

    Raises:
        ValueError: another autoencoder made them.
    """
    autoencoder = getattr(getattr(stage, "model", None), "autoencoder", None)
    file = Path(source) / RECORD if isinstance(source, str | Path) else None
    if file is None or not file.is_file() or autoencoder is None or not list(autoencoder.parameters()):
        return
    there, here = json.loads(file.read_text(encoding="utf-8"))["autoencoder"], weights_hash(autoencoder)
    if there != here:
        raise ValueError(
            f"The latents in {source} were made by another autoencoder (sha256 {there[:12]}) than the model's ({here[:12]}). "
            "Make them again with `python precompute.py model=AUTOENCODER out=...`, or name the autoencoder that made them with "
            "autoencoder.path=FOLDER."
        )


def _claim(folder: Path, record: Mapping[str, Any]) -> None:
    """Says what the folder is for, or makes sure that it is for this."""
    file = folder / RECORD
    if not file.is_file():
        if any(folder.glob("*.tar")):
            raise ValueError(f"{folder} holds shards that are not ours; write to another folder (out=...).")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    before = json.loads(file.read_text(encoding="utf-8"))
    if other := [f"{k} {before.get(k)} there, {v} here" for k, v in record.items() if before.get(k) != v]:
        raise ValueError(f"{folder} holds other latents: {'; '.join(other)}. Write to another folder (out=...), or remove it.")


def _moments_of(
    autoencoder: Autoencoder, data: Any, samples: Any, rows: range, batch: int, device: Any, half: bool
) -> Iterator[dict[str, Any]]:
    loaded = Loaded(samples)
    for first in range(rows.start, rows.stop, batch):
        chosen = range(first, min(first + batch, rows.stop))
        fields = loaded.__getitems__([Place(i, *samples.selection.locate(i), data.size, data.size) for i in chosen])
        fields = data.on_after_batch_transfer(data.transfer_batch_to_device(fields, device, 0), 0)
        moments = autoencoder.encode(fields["image"])
        stacked = torch.cat((moments.mean, moments.std), dim=1).cpu().numpy().astype(np.float16 if half else np.float32)
        for i, key in enumerate(fields["key"]):
            kept = {member: fields[field][i] for member, field in REST.items() if field in fields}
            kept |= {"cls": int(kept["cls"])} if "cls" in kept else {}
            yield {"__key__": key, "moments.npy": stacked[i], **kept}
