"""Samples of moments, encoded ahead of time: what precompute.py writes as shards and `fields.moments=moments.npy` reads."""

from collections.abc import Iterator
from typing import Any

import torch

from ldm.types import Autoencoder


@torch.no_grad()
def moments_of(autoencoder: Autoencoder, data: Any, split: str, batch: int, device: Any) -> Iterator[dict[str, Any]]:
    """One sample for each of `data`'s, in order: moments.npy (2C, H, W) float32, whitened mean above std; the rest as it was."""
    for fields in data.ordered(split, batch=batch):
        images = data.on_after_batch_transfer(data.transfer_batch_to_device(fields, device, 0), 0)["image"]
        moments = autoencoder.encode(images)
        stacked = torch.cat((moments.mean, moments.std), dim=1).cpu().numpy()
        for i, key in enumerate(fields["key"]):
            rest = {"txt": "caption", "cls": "label", "json": "json"}
            kept = {member: fields[field][i] for member, field in rest.items() if field in fields}
            kept |= {"cls": int(kept["cls"])} if "cls" in kept else {}
            yield {"__key__": key, "moments.npy": stacked[i], **kept}
