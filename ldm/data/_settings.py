"""What a data module refuses to be told, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.shard.decode import decoder, is_array, is_text
from ldm.data.shard.source import check_sources
from ldm.errors import Refusal

RESERVED = ("key", "position", "bad")
CHOICES = {"on_mismatch": ("refuse", "restart_epoch"), "damaged": ("refuse", "leave_out"), "crop": ("center", "random")}


def check_settings(train: Any, val: Any, fields: Mapping[str, str], weights: Any, sizes: Sequence[Any], **words: Any) -> None:
    """Looks at the settings, each alone and together.

    Args:
        train, val: where the samples lie.
        fields: batch field -> member.
        weights: the shares of the entries of `train`, or None.
        sizes: of the buckets; one where there are none.
        **words: size, batch, flip, and those of CHOICES.

    Raises:
        Refusal: one of them means nothing.
    """
    for option, source in {"data.train": train, "data.val": val or []}.items():
        check_sources(source, option)
    for field, member in fields.items():
        if field in RESERVED:
            raise Refusal(f"data.fields.{field}: every batch has `{field}` already; give this field another name.")
        decoder(member)
    flip, crop = words["flip"], words["crop"]
    if wrong := [f"data.{name}={words[name]}" for name in ("size", "batch") if words[name] < 1]:
        raise Refusal(f"{wrong[0]}: wanted 1 or more.")
    if not 0 <= flip <= 1:
        raise Refusal(f"data.flip={flip}: wanted the share of pictures that is mirrored, in [0, 1].")
    if (flip or crop != "center") and all(is_array(member) or is_text(member) for member in fields.values()):
        raise Refusal(f"data.flip={flip} data.crop={crop}: data.fields names no pictures, only {fields}.")
    if (flip or crop != "center") and "moments" in fields:
        raise Refusal(f"data.flip={flip} data.crop={crop}: the pictures beside latents would be cut otherwise than these were.")
    for name, choices in CHOICES.items():
        if words[name] not in choices:
            raise Refusal(f"data.{name}={words[name]!r}; wanted `{choices[0]}` or `{choices[1]}`.")
    if weights is not None:
        _check_weights(train, weights)
    if weights and len(sizes) > 1:
        raise Refusal("data.weights with data.buckets: a mixture has no buckets; leave one of the two out.")


def _check_weights(train: str | Path | Sequence[str | Path], weights: Sequence[float]) -> None:
    if isinstance(train, str | Path) or len(weights) != len(train):
        raise Refusal(f"data.weights={list(weights)}: data.train must be a list of as many data sets.")
    if not all(weight > 0 for weight in weights):
        raise Refusal(f"data.weights={list(weights)}: each must be above 0; leave the others out, of data.train too.")
