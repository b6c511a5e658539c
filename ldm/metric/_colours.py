"""Which of a few colours each pixel of a picture is nearest to: a label map read back from a picture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.files.picture import from_bytes


def labels_of(images: Tensor, palette: Sequence[Sequence[int]]) -> Tensor:
    """images: (B, 3, h, w) in [-1, 1], palette: K colours in 0 to 255 -> (B, h, w) integers, the number of the nearest colour."""
    colours = from_bytes(torch.tensor(palette, device=images.device))
    distance = (images.float()[:, None] - colours[None, :, :, None, None]).square().sum(2)
    return distance.argmin(1)


def regions(labels: Tensor, count: int) -> Tensor:
    """labels: (B, h, w) integers in [0, count) -> (B, count, h, w) bool, where each label is."""
    return labels[:, None] == torch.arange(count, device=labels.device)[:, None, None]


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """values, chosen: (B, K) -> (B), the mean of the chosen of each row; NaN where none is."""
    return (values * chosen).sum(1) / chosen.sum(1)
