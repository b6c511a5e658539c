"""Drawing in half precision: of the network alone, since latents, schedules and autoencoders would suffer from it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Batch, Conditioned, Denoise, Guidance

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)  # the layers that autocast multiplies in 16 bits


def precision_of(setting: Any, usual: Mapping[str, Any], device: torch.device) -> str:
    """The setting `precision` -> 32, bf16 or 16; None means, on a GPU, the precision that the model's `usual` section names.

    Raises:
        Refusal: it is none of these.
    """
    default = usual.get("precision", "32") if device.type in ("cuda", "mps") else "32"
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


class Half:
    """A network's forward whose matrices are kept in 16 bits: it computes under autocast to these, unless another is on."""

    def __init__(self, forward: Callable[..., Tensor], kind: torch.dtype) -> None:
        self.forward, self.kind = forward, kind

    def __call__(self, x: Tensor, *inputs: Any) -> Tensor:
        """As the network's forward."""
        if torch.is_autocast_enabled(x.device.type):
            return self.forward(x, *inputs)
        with torch.autocast(x.device.type, self.kind):
            return self.forward(x, *inputs)


def hold(backbone: nn.Module, usual: Mapping[str, Any], precision: str) -> None:
    """Keeps a network's matrices, in place, in the 16 bits that its file has (`usual`) where it computes in 16, else in float32.

    No number changes: autocast would round to the same, call by call, and a matrix that 16 bits do not hold, such as one that an
    adapter has changed, stays as it is.
    """
    kind = None if precision == "32" else PRECISIONS[usual.get("precision", "32")]
    now = vars(backbone).get("forward")
    if kind == (now.kind if isinstance(now, Half) else None):
        return
    if isinstance(now, Half):
        backbone.forward = now.forward
    for layer in backbone.modules():
        for weight in layer.parameters(recurse=False) if isinstance(layer, MATRICES) else ():
            rounded = weight.data.to(kind or torch.float32)
            if torch.equal(rounded.to(weight.dtype), weight.data):
                weight.data = rounded
    if kind is not None:
        backbone.forward = Half(backbone.forward, kind)
