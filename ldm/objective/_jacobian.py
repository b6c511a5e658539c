"""Derivatives of a network along a direction, while its weights take gradients."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.types import Cond, Denoiser


def along(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, step: tuple[Tensor, Tensor], to: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_t: (B, C, H, W), t: (B), to: (B) or None, step: a direction of x_t and one of t.

    -> the network's output (B, C, H, W), whose gradients reach the weights, and its derivative in that direction, which has none.
    Attention is computed by its formula there: no other kernel has forward derivatives (pytorch/pytorch issue 117206).
    """
    with sdpa_kernel(SDPBackend.MATH):
        output, change = torch.func.jvp(lambda x, t: denoiser.output(x, t, cond, to), (x_t, t), step)
    return output, change.detach()
