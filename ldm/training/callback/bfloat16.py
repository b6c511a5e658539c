"""bfloat16 from layer to layer, computed from float32 weights."""

from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm, rms_norm

from ldm.errors import Refusal
from ldm.training.base import Stage


class Bfloat16(pl.Callback):
    """Within trainer.precision=bf16-mixed, norms of the stage's networks put out bfloat16, as all other layers do.

    Autocast rounds the weights once a step and keeps them float32 for the optimizer, the averages and the checkpoints; on a
    GPU it also has each norm compute, and put out, float32, which the next layer rounds. So a U-Net is its copy in bfloat16
    with float32 masters. What is added to a float32 stream (DiT's positions) stays float32.
    """

    def on_fit_start(self, trainer: pl.Trainer, module: Stage) -> None:
        """Raises ValueError where autocast to bfloat16 is not on."""
        if trainer.precision != "bf16-mixed":
            raise Refusal(
                f"callback=[...,bfloat16] with trainer.precision={trainer.precision}: use it with trainer.precision=bf16-mixed."
            )
        for name in module.compiled:
            keep_bfloat16(module.get_submodule(name))


def keep_bfloat16(network: nn.Module) -> None:
    """Makes a network's norms put out autocast's type."""
    for norm in network.modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            norm.forward = partial(normalised, norm)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """(B, ...) -> (B, ...) in autocast's type, its sums in float32; without autocast as ever."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return type(norm).forward(norm, x)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, getattr(norm, "bias", None)))
    with torch.autocast(kind, enabled=False):
        if isinstance(norm, nn.GroupNorm):
            y = group_norm(x, norm.num_groups, weight, bias, norm.eps)
        elif isinstance(norm, nn.LayerNorm):
            y = layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
        else:
            y = rms_norm(x, norm.normalized_shape, weight, norm.eps)
    return y.to(torch.get_autocast_dtype(kind))
