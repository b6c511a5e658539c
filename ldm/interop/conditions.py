"""The family's conditions beside text: the sizes of XL, the score of its refiner, and what the map channels of a U-Net are."""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal

EDIT = "ldm.condition.edit.Edit"
LABEL = "conditioner.embedders.label.table.weight"
CLASSES = 1000  # of ImageNet
IDENTITY = {"_target_": "ldm.nn.layers.identity", "_partial_": True}
SIZES = {"original_height": "height", "original_width": "width", "crop_top": 0, "crop_left": 0}
TARGET = {"target_height": "height", "target_width": "width"}
SCORE = {"aesthetic_score": 6.0}


def number_node(refiner: bool, width: int = 256) -> dict[str, Any]:
    """The numbers that XL is told, as published, each as so many waves."""
    fields = {**SIZES, **(SCORE if refiner else TARGET)}
    return {"_target_": "ldm.condition.number.Number", "fields": fields, "width": width}


def with_null(table: Tensor) -> Tensor:
    """A published class table, whose last row means no label; one of exactly 1,000 rows has none and gets one, of zeros.

    So many are ImageNet's classes alone, as networks that never saw a class dropped have them (LDM-8 on VQ, 2112.10752).
    """
    return torch.cat((table, table.new_zeros(1, table.shape[1]))) if len(table) == CLASSES else table


def without_null(table: Tensor) -> Tensor:
    """The inverse of `with_null`.

    Raises:
        Refusal: 999 classes and no label, whose 1,000 rows would be read as 1,000 classes.
    """
    if len(table) == CLASSES:
        raise Refusal("A file's table of 1,000 rows is read as 1,000 classes, and this model has 999. Use --to ldm.")
    return table[:-1] if lacks_null(table) else table


def lacks_null(table: Tensor) -> bool:
    """Whether the row of a class table that means no label was added to it, and never trained."""
    return len(table) == CLASSES + 1 and not table[-1].any()


def map_node(spatial: int, channels: int, told: Set[str], table: Tensor | None, edits: bool) -> dict[str, Any]:
    """What the map channels of a published U-Net of `channels` latent channels are, with its `table` of noise steps if any.
    `told` names what else it is told; `edits` says that XL's are an edit's, told latents as InstructPix2Pix has them.

    Raises:
        Refusal: they are none that is known.
    """
    if spatial == 0:
        return {}
    if spatial == 3 and table is not None:
        steps, width = table.shape
        node = {"_target_": "ldm.condition.upscale.Upscale", "_partial_": True, "steps": steps, "width": width}
        return {"upscale": node}
    known = {1 + channels: ("inpaint", "ldm.condition.inpaint.Inpaint"), 1: ("depth", "ldm.condition.depth_map.DepthMap")}
    known |= {channels: ("edit", EDIT)} if edits or "number" not in told else {}
    if spatial not in known or not told:
        raise Refusal(
            f"The U-Net takes {spatial} channels beside the {channels} noisy ones{'' if told else ', and no text'}. Whole models "
            f"are known with, beside text: 1 (depth), {1 + channels} (inpainting), {channels} (InstructPix2Pix of Stable "
            "Diffusion 1 and 2; of XL where model_index.json names its pipeline, and not CosXL's), and 3 with a table of noise "
            "steps (upscaling)."
        )
    name, target = known[spatial]
    return {name: {"_target_": target, "_partial_": True}}
