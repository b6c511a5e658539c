"""Sinusoidal features, by which a network reads a noise level, a size or a score.

cos(w_i level), sin(w_i level), with w_i = 10000^(-2 i / width) for i = 0 ... width / 2 - 1 (https://arxiv.org/abs/1706.03762,
section 3.5)
"""

import math

import torch
from torch import Tensor


def sinusoid(level: Tensor, width: int) -> Tensor:
    """level: (B), about 0 to 1000 -> (B, width), float32: cosines, then sines, of wavelengths from 2 pi to 10,000 * 2 pi."""
    freqs = torch.exp(torch.arange(width // 2, device=level.device) * (-math.log(10_000) / (width // 2)))
    angle = level.float()[:, None] * freqs
    return torch.cat((angle.cos(), angle.sin()), dim=1)
