"""Derivatives of a network along a direction, while its weights take gradients."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.types import Cond, Denoiser


def along(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, step: tuple[Tensor, Tensor], to: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> the network's output (B, C, H, W), whose gradients reach the weights, and its derivative in a direction, which has none.

    Attention is computed by its formula there: no other kernel has forward derivatives (pytorch/pytorch issue 117206).

    Args:
        denoiser: whose network it is.
        x_t, t: (B, C, H, W) and (B), the place.
        cond: the network's condition there.
        step: the direction, one of x_t and one of t.
        to: (B), the time that a flow map goes to, or None.
    """
    with sdpa_kernel(SDPBackend.MATH):
        output, change = torch.func.jvp(lambda x, t: denoiser.output(x, t, cond, to), (x_t, t), step)
    return output, change.detach()
