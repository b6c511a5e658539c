"""Numbers as waves: how a network is told a noise level, a size or a score."""

import math

import torch
from torch import Tensor


def sinusoid(level: Tensor, width: int) -> Tensor:
    """level: (B), about 0 to 1000 -> (B, width): cosines, then sines, of wavelengths 2 pi to 10,000 * 2 pi."""
    freqs = torch.exp(torch.arange(width // 2, device=level.device) * (-math.log(10_000) / (width // 2)))
    angle = level.float()[:, None] * freqs
    return torch.cat((angle.cos(), angle.sin()), dim=1)
