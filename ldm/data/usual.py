"""What a model was trained on, kept beside its recipe as `usual`: the size and the data that it is drawn and measured at by
default. evaluate.py's data=usual means it; each setting of it that is said on the command line is taken instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.shard.fetch import is_remote
from ldm.errors import Refusal

WORD = "usual"  # of a setting that is as the model's own data have it
KEPT = "usual.json"  # beside shards of latents: the usual of the pictures that they were made of
EMOJI, SHARDS = "ldm.data.emoji.Emoji", "ldm.data.shards.Shards"
DREAMBOOTH = "ldm.data.dreambooth.DreamBooth"
OWN = "val groups val_fraction filters tokens pictures prompt templates prior prior_weight".split()  # of those pictures alone
# How training reads, in which order and how much at a time, is no part of what the data are; where the emoji lie neither.
READING = "batch seed workers crop flip buckets weights window lanes cache cache_gb on_mismatch max_bad_fraction shuffle".split()


class Usual:
    """Stands for the data of a model that is measured; where no model is, there is nothing to stand for.

    Raises:
        Refusal: always.
    """

    def __init__(self, **settings: Any) -> None:
        raise Refusal("data=usual, the data that a model was trained on, is for evaluate.py: name data=shards or others.")


def usual_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """A training's plain `data` node -> {"resolution": [h, w], "data": node}, what goes into the recipe of its model.

    Paths are made absolute, so that a model is measured from any folder. Of latents it is that of their pictures, where
    precompute.py kept it beside them.
    """
    train = data.get("train")
    if isinstance(train, str) and "image" not in data.get("fields", {}) and (Path(train) / KEPT).is_file():
        return json.loads((Path(train) / KEPT).read_text())
    left = {*READING, *(["root"] if data.get("_target_") == EMOJI else [])}
    node = {name: value for name, value in data.items() if name not in left and value is not None}
    node |= {split: _absolute(node[split]) for split in ("train", "val", "pictures", "prior") if split in node}
    return {"resolution": [data["size"]] * 2, "data": node} if isinstance(data.get("size"), int) else {"data": node}


def resolved(said: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """evaluate.py's plain `data` node and a model's `usual` -> the node to build: the usual one, but for what is said.

    Where a model says nothing of its data, they are the emoji, or the shards that data.train names. data.train without data.val
    has no validation pictures. Another group than data=usual is as it is.
    """
    if said.get("_target_") != f"{__name__}.{Usual.__name__}":
        return dict(said)
    given = {name: value for name, value in said.items() if value != WORD and name not in ("_target_", "fields")}
    base = dict(usual.get("data") or {"_target_": EMOJI, "size": 32})
    if "train" in given:
        base = {**base, "_target_": SHARDS} if base["_target_"] in (EMOJI, DREAMBOOTH) else base
        base = {name: value for name, value in base.items() if name not in OWN}
    fields = {name: member for name, member in said["fields"].items() if member != WORD}
    fields = {**base.get("fields", {"image": "jpg", "caption": "txt"}), **fields}
    return {**base, **given, "fields": fields}


def size_of(resolution: int | Sequence[int] | None, usual: Mapping[str, Any]) -> tuple[tuple[int, int], list[str]]:
    """What is asked for and a model's `usual` -> height and width in pixels to draw, and what is to be said of them."""
    wanted = usual.get("resolution") or 32 if resolution is None else resolution
    sides = [wanted, wanted] if isinstance(wanted, int) else list(wanted)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise Refusal(f"resolution={resolution}: wanted pixels, one number, or [height, width].")
    size = (sides[0], sides[1])
    if resolution is None and "resolution" not in usual:
        return size, ["Drawing at 32x32 pixels, since the model does not say what it was trained at (resolution=...)."]
    return size, [line for line in [far(size, usual)] if line]


def far(size: Sequence[int], usual: Mapping[str, Any]) -> str:
    """size: height and width in pixels -> a line where one is beyond twice, or below half, the model's usual; else ""."""
    sides = usual.get("resolution")
    if sides is None or all(a <= 2 * b and b <= 2 * a for a, b in zip(size, sides)):
        return ""
    return (
        f"{size[0]}x{size[1]} pixels are far from the {sides[0]}x{sides[1]} that the model was trained at: expect worse pictures."
    )


def _absolute(source: Any) -> Any:
    if isinstance(source, list):
        return [_absolute(one) for one in source]
    return source if is_remote(str(source)) else os.path.abspath(source)
