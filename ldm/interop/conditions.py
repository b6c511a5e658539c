"""The family's conditions beside text: the sizes of XL, the score of its refiner, the hole of inpainting."""

from typing import Any

SIZES = {"original_height": "height", "original_width": "width", "crop_top": 0, "crop_left": 0}
TARGET = {"target_height": "height", "target_width": "width"}
SCORE = {"aesthetic_score": 6.0}


def number_node(refiner: bool) -> dict[str, Any]:
    """The numbers that XL is told, as published."""
    return {"_target_": "ldm.condition.number.Number", "fields": {**SIZES, **(SCORE if refiner else TARGET)}}


def inpaint_node(spatial: int, channels: int) -> dict[str, Any]:
    """What the map channels of a published U-Net of `channels` latent channels are.

    Raises:
        ValueError: they are none that is known.
    """
    if spatial not in (0, 1 + channels):
        raise ValueError(
            f"The U-Net takes {spatial} channels beside the {channels} noisy ones; 0 (text alone) and {1 + channels} (inpainting)"
            " are known as whole models."
        )
    return {"inpaint": {"_target_": "ldm.condition.inpaint.Inpaint", "_partial_": True}} if spatial else {}
