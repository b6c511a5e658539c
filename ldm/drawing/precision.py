"""Drawing in half precision: the network alone, since latents, schedules and autoencoders lose by it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.types import Batch, Conditioned, Denoise, Guidance

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


def precision_of(said: Any, usual: Mapping[str, Any], device: torch.device) -> str:
    """What is said, or else, on a GPU, what the model's weights are kept in -> 32, bf16 or 16.

    Raises:
        Refusal: it is none of these.
    """
    kept = usual.get("precision", "32") if device.type == "cuda" else "32"
    word = str(kept if said is None else said)
    if word not in PRECISIONS:
        raise Refusal(f"precision={word}: wanted one of {', '.join(PRECISIONS)}.")
    return word


def in_precision(guidance: Guidance, precision: str, device: torch.device) -> Guidance:
    """The same guidance, of a network that computes in `precision`; what it says is float32."""
    kind = PRECISIONS[precision]
    if kind is None:
        return guidance

    def guide(model: Conditioned, ask: Batch) -> Denoise:
        with torch.autocast(device.type, kind):
            denoise = guidance(model, ask)

        def said(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            with torch.autocast(device.type, kind):
                return denoise(x_t, t, *to).float()

        return said

    return guide
