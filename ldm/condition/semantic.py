"""A map of labels, pixel by pixel: semantic synthesis (https://arxiv.org/abs/2112.10752, section 4.3.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition._files import numbered, painted, palette, read_maps
from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.types import Autoencoder, Cond, Widths


class Semantic(Condition):
    """A label map -> maps at latent resolution, of each label the share of the area: no thin region vanishes.

    Args:
        autoencoder: the model's, whose factor says how large the latents are.
        classes: how many labels there are, 0 to classes - 1.
        width: of a learned vector for each label, of which a latent pixel is told the mean; None: it is told the shares.
        key: the field of the map.
        rate: the share of samples for which the map is dropped in training, in [0, 1]; then it is zeros.
    """

    def __init__(
        self, autoencoder: Autoencoder, classes: int, width: int | None = None, key: str = "map", rate: float = 0.1
    ) -> None:
        super().__init__()
        self.factor, self.classes, self.key, self.rate = autoencoder.factor, classes, key, rate
        self.table = None if width is None else nn.Parameter(torch.randn(classes, width))
        self.widths = Widths(spatial=classes if width is None else width)

    def forward(self, value: Tensor, drop: Tensor) -> Cond:
        """value: (B, f * H, f * W) integers in [0, classes), drop: (B) bool -> spatial: (B, C', H, W).

        Raises:
            Refusal: labels out of range, or a size that the factor does not divide.
        """
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < self.classes:
            raise Refusal(
                f"A map in the field '{self.key}' has labels from {int(value.min())} to {int(value.max())}; this model knows "
                f"0 to {self.classes - 1} (condition.semantic.classes=...)."
            )
        if value.shape[1] % self.factor or value.shape[2] % self.factor:
            raise Refusal(
                f"Maps of {tuple(value.shape[1:])} do not divide by the autoencoder's factor {self.factor} (data.size)."
            )
        shares = shares_of(value, self.classes, self.factor)
        maps = shares if self.table is None else torch.einsum("bkhw,kc->bchw", shares, self.table)
        return Cond(spatial=maps * (~drop).to(maps, non_blocking=True)[:, None, None, None])

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Files of label maps, or folders of them -> (N, height, width) integers."""
        return read_maps(field, values, size)

    def input(self, field: str) -> Input:
        """A map that is painted."""
        return Input("map", numbered(self.classes), palette(self.classes))

    def show(self, value: Tensor) -> Tensor:
        """value: as in `forward` -> (B, 3, f * H, f * W) in [-1, 1], a colour for each label."""
        return painted(value, self.classes)


def shares_of(labels: Tensor, classes: int, factor: int) -> Tensor:
    """labels: (B, f * H, f * W) integers -> (B, classes, H, W), counted cell by cell: no map of one-hot pixels is laid out."""
    count, height, width = labels.shape
    cells = labels.reshape(count, height // factor, factor, width // factor, factor).permute(0, 2, 4, 1, 3).flatten(1, 2)
    counts = torch.zeros(count, classes, *cells.shape[2:], device=labels.device)
    return counts.scatter_add_(1, cells, counts.new_ones(()).expand(cells.shape)).div_(factor**2)
