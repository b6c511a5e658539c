"""Text towers of CLIPs in a recipe: where they lie, and how they are built."""

from collections.abc import Mapping
from typing import Any

import torch

from ldm.files.folder import LOCAL
from ldm.tower.clip import blank_text_tower

CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")


def towers(condition: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The text towers' configs by the sub-folder where their weights lie."""
    found = {}
    for name, node in condition.items():
        if node.get("_target_") == "ldm.condition.text.Text":
            found[f"condition.{name}"] = node
        for tower, inner in node.get("towers", {}).items():
            found[f"condition.{name}.towers.{tower}"] = inner
    return found


def tower_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a text tower of open_clip's model_cfg."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in blank_text_tower(config).state_dict().items() if name != "logit_scale"}


def text_node(place: str, **settings: Any) -> dict[str, Any]:
    """The config of a published text condition whose tower lies in the sub-folder `place`."""
    return {"_target_": "ldm.condition.text.Text", "model": f"{LOCAL}./{place}", "tokenizer": "clip", **settings}
