"""Drawing in half precision: of the network alone, since latents, schedules and autoencoders would suffer from it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.types import Batch, Conditioned, Denoise, Guidance

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


def precision_of(setting: Any, usual: Mapping[str, Any], device: torch.device) -> str:
    """The setting `precision` -> 32, bf16 or 16; None means, on a GPU, the precision that the model's `usual` section names.

    Raises:
        Refusal: it is none of these.
    """
    default = usual.get("precision", "32") if device.type == "cuda" else "32"
    word = str(default if setting is None else setting)
    if word not in PRECISIONS:
        raise Refusal(f"precision={word}: wanted one of {', '.join(PRECISIONS)}.")
    return word


def in_precision(guidance: Guidance, precision: str, device: torch.device) -> Guidance:
    """-> the same guidance, whose network computes in `precision` under autocast, and whose estimates are float32."""
    kind = PRECISIONS[precision]
    if kind is None:
        return guidance

    def guide(model: Conditioned, ask: Batch) -> Denoise:
        with torch.autocast(device.type, kind):
            denoise = guidance(model, ask)

        def estimate(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            with torch.autocast(device.type, kind):
                return denoise(x_t, t, *to).float()

        return estimate

    return guide
