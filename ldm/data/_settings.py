"""What a data module refuses to be told, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.data.shard.decode import decoder, is_array, is_text
from ldm.data.shard.source import check_sources
from ldm.errors import Refusal

if TYPE_CHECKING:
    from ldm.data.shards import Shards

RESERVED = ("key", "position", "bad")
CHOICES = {"on_mismatch": ("refuse", "restart_epoch"), "damaged": ("refuse", "leave_out"), "crop": ("center", "random")}


def check_settings(data: Shards) -> None:
    """Looks at the settings, each alone and together.

    Raises:
        Refusal: one of them means nothing.
    """
    for option, source in {"data.train": data.train, "data.val": data.val or []}.items():
        check_sources(source, option)
    for field, member in data.fields.items():
        if field in RESERVED:
            raise Refusal(f"data.fields.{field}: every batch has `{field}` already; give this field another name.")
        decoder(member)
    if (data.flip or data.crop != "center") and all(is_array(member) or is_text(member) for member in data.fields.values()):
        raise Refusal(f"data.flip={data.flip} data.crop={data.crop}: data.fields names no pictures, only {data.fields}.")
    for name, words in CHOICES.items():
        if getattr(data, name) not in words:
            raise Refusal(f"data.{name}={getattr(data, name)!r}; wanted `{words[0]}` or `{words[1]}`.")
    if data.weights is not None:
        _check_weights(data.train, data.weights)
    if data.weights and len(data.sizes) > 1:
        raise Refusal("data.weights with data.buckets: a mixture has no buckets; leave one of the two out.")


def _check_weights(train: str | Path | Sequence[str | Path], weights: Sequence[float]) -> None:
    if isinstance(train, str | Path) or len(weights) != len(train):
        raise Refusal(f"data.weights={list(weights)}: data.train must be a list of as many data sets.")
    if not all(weight > 0 for weight in weights):
        raise Refusal(f"data.weights={list(weights)}: each must be above 0; leave the others out, of data.train too.")
