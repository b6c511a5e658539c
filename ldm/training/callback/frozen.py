"""Frozen weights in bfloat16, which is what autocast makes of them in every call: the same numbers in half the memory."""

from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.errors import Refusal
from ldm.training.base import Stage
from ldm.training.parallel.sharded import Sharded

KINDS = (nn.Linear, nn.Conv2d)  # what autocast runs in 16 bits, weights and all; norms and tables stay float32
LENGTHS = "lora_magnitude_vector"  # beside a layer whose rows DoRA measures, in float32


class Frozen(pl.Callback):
    """Within trainer.precision=bf16-mixed, the frozen model's linear layers and convolutions are kept in bfloat16.

    The loss and all gradients are the same to the bit. What is drawn while training, which is outside of autocast, is of rounded
    weights. What is trained, what is saved and what is exported stay float32.
    """

    def setup(self, trainer: pl.Trainer, module: Stage, stage: str) -> None:
        """Before anything is on the device.

        Raises:
            Refusal: autocast to bfloat16 is not on, weights are shared out, or nothing is frozen.
        """
        if trainer.precision != "bf16-mixed":
            raise Refusal(f"callback=[...,frozen] with trainer.precision={trainer.precision}: it is for bf16-mixed.")
        if isinstance(trainer.strategy, Sharded):
            raise Refusal("callback=[...,frozen] with trainer=fsdp, which shares out weights of one type: leave one of them out.")
        module.frozen_content()  # of what was read, not of what is made of it here
        model = module.latent_model()
        names = [] if model is None else in_bfloat16(model)
        if not names:
            raise Refusal("callback=[...,frozen]: no linear layer or convolution of this model is frozen; leave it out.")
        if trainer.is_global_zero:
            print(f"callback.frozen: {len(names)} frozen layers are kept in bfloat16", flush=True)


def in_bfloat16(model: nn.Module) -> list[str]:
    """Rounds the frozen layers of a model, in place -> their names."""
    chosen = layers_of(model)
    for name in chosen:
        layer = model.get_submodule(name)
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()
        layer.forward = partial(rounded, layer)
    return chosen


def layers_of(model: nn.Module) -> list[str]:
    """The names of the frozen layers that can be rounded."""
    inside = {f"{name}." for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)}  # read by name
    inside |= {name.partition(LENGTHS)[0] for name, _ in model.named_parameters() if LENGTHS in name}
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, KINDS) and not part.weight.requires_grad and not name.startswith(tuple(inside))
    ]


def rounded(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, ...) -> (B, ...), in autocast's type; without autocast in that of x."""
    if torch.is_autocast_enabled(x.device.type) or x.dtype == layer.weight.dtype:
        return type(layer).forward(layer, x)
    return functional_call(layer, {name: p.to(x.dtype) for name, p in layer.named_parameters(recurse=False)}, (x,))
