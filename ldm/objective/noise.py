"""The noise to train with."""

from dataclasses import dataclass

from torch import Tensor

from ldm.types import Draw


@dataclass(frozen=True)
class Normal:
    """Unit normal, every number by itself."""

    def __call__(self, draw: Draw, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        return draw.normal("noise", x.shape[1:]).to(x, non_blocking=True)


@dataclass(frozen=True)
class Offset:
    """Besides, each channel as a whole moves by `strength`: pictures can then become all dark or all bright.

    https://www.crosslabs.org/blog/diffusion-with-offset-noise (2023); its strength is 0.1.
    """

    strength: float = 0.1

    def __call__(self, draw: Draw, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        noise, offset = draw.normal("noise", x.shape[1:]), draw.normal("offset", (x.shape[1], 1, 1))
        return (noise + self.strength * offset).to(x, non_blocking=True)
