"""Random masks for inpainting, 1 where to repaint: strokes, boxes, half-planes, and all around a box (outpainting)."""

import math
import zlib
from itertools import pairwise

import torch
from torch import Tensor


def key_generator(key: str, position: int | None = None) -> torch.Generator:
    """The random numbers of a sample: of its key alone, or in training also of its position, so that each epoch differs."""
    word = key if position is None else f"{key}/{position}"
    return torch.Generator().manual_seed(zlib.crc32(word.encode()))


def random_mask(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """size: height, width -> (1, height, width) of 0 and 1, neither empty nor full; one of the four kinds, each as likely."""
    kinds = (strokes, box, half_plane, outpainting)
    kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
    y, x = torch.meshgrid(*(torch.linspace(0.5 / s, 1 - 0.5 / s, s) for s in size), indexing="ij")
    mask = kind(y, x, generator).float()[None]
    return mask if 0 < mask.mean() < 1 else half_plane(y, x, generator).float()[None]


def box(y: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """y, x: (h, w) in (0, 1) -> (h, w) bool, a rectangle with sides of 0.25 to 0.75."""
    height, width = (0.25 + 0.5 * _uniform(2, generator)).tolist()
    top, left = (_uniform(2, generator) * torch.tensor([1 - height, 1 - width])).tolist()
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def outpainting(y: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """y, x: (h, w) in (0, 1) -> (h, w) bool, all but a rectangle."""
    return ~box(y, x, generator)


def half_plane(y: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """y, x: (h, w) in (0, 1) -> (h, w) bool, one side of a line that passes within 0.15 of the middle."""
    angle, offset = (_uniform(2, generator) * torch.tensor([2 * math.pi, 0.3]) - torch.tensor([0, 0.15])).tolist()
    return (y - 0.5) * math.sin(angle) + (x - 0.5) * math.cos(angle) > offset


def strokes(y: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """y, x: (h, w) in (0, 1) -> (h, w) bool, one to three brush strokes of two to five straight pieces, 0.1 to 0.25 wide."""
    covered = torch.zeros_like(y, dtype=torch.bool)
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        width = 0.1 + 0.15 * _uniform(1, generator).item()
        points = _uniform((int(torch.randint(3, 7, (), generator=generator)), 2), generator)
        for start, end in pairwise(points):
            covered |= _distance(y, x, start, end) < width / 2
    return covered


def _distance(y: Tensor, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """From each point to the straight piece between two points, (2) each."""
    dy, dx = end - start
    along = ((y - start[0]) * dy + (x - start[1]) * dx) / (dy * dy + dx * dx).clamp(min=1e-12)
    along = along.clamp(0, 1)
    return torch.hypot(y - start[0] - along * dy, x - start[1] - along * dx)


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)
