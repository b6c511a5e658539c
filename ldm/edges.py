"""The edges of a picture (J. Canny, A Computational Approach to Edge Detection, 1986), for control pictures and their measure.

Grey g = 0.299 R + 0.587 G + 0.114 B is smoothed by a Gaussian, its gradient (gx, gy) taken by Sobel's kernels, thinned to the
places where |(gx, gy)| is largest along its own direction, and kept where it is strong, or weak and joined to what is strong.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, pad

GREY = (0.299, 0.587, 0.114)
STEPS = ((0, 1), (1, 1), (1, 0), (1, -1))  # y, x: to the neighbour in each of the four directions of a gradient


def edges(images: Tensor, low: float = 0.4, high: float = 0.8, sigma: float = 0.7) -> Tensor:
    """images: (B, 3, h, w) in [-1, 1] -> (B, 1, h, w) bool, True on an edge.

    Args:
        low, high: gradients, of which a sharp step from black to white has 4, from which one is weak, or strong.
        sigma: of the smoothing, in pixels.
    """
    grey = (images.double() * torch.tensor(GREY, device=images.device)[:, None, None]).sum(1, keepdim=True).add(1).div(2)
    gx, gy = _gradient(_smooth(grey, sigma))
    size = torch.hypot(gx, gy).mul(1e6).round().div(1e6)  # what is equal is equal on any machine
    peak = _peaks(size, gx, gy)
    strong, weak = peak & (size >= high), peak & (size >= low)
    while True:  # weak edges that touch strong ones are strong
        grown = weak & (max_pool2d(strong.double(), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, strong):
            return strong
        strong = grown


def drawn(lines: Tensor) -> Tensor:
    """lines: (B, 1, h, w) bool -> the control picture: (B, 3, h, w) in [-1, 1], white edges on black."""
    return lines.float().mul(2).sub(1).expand(-1, 3, -1, -1)


def _smooth(grey: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(3 * sigma))
    kernel = torch.arange(-reach, reach + 1, dtype=grey.dtype, device=grey.device).div(sigma).square().div(-2).exp()
    kernel = kernel / kernel.sum()
    grey = conv2d(pad(grey, (reach, reach, 0, 0), "replicate"), kernel[None, None, None])
    return conv2d(pad(grey, (0, 0, reach, reach), "replicate"), kernel[None, None, :, None])


def _gradient(grey: Tensor) -> tuple[Tensor, Tensor]:
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=grey.dtype, device=grey.device)
    padded = pad(grey, (1, 1, 1, 1), "replicate")
    return conv2d(padded, across[None, None]), conv2d(padded, across.T[None, None])


def _peaks(size: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
    """Where no neighbour along the gradient has a larger one; of two equals the second is taken."""
    direction = torch.atan2(gy, gx).div(torch.pi / 4).round().long() % 4
    padded, (h, w) = pad(size, (1, 1, 1, 1)), size.shape[2:]
    peak = torch.zeros_like(size, dtype=torch.bool)
    for i, (y, x) in enumerate(STEPS):
        ahead, behind = padded[..., 1 + y : 1 + y + h, 1 + x : 1 + x + w], padded[..., 1 - y : 1 - y + h, 1 - x : 1 - x + w]
        peak |= (direction == i) & (size > ahead) & (size >= behind)
    return peak
