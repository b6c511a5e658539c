"""A picture with a hole, and where the hole is: inpainting (https://arxiv.org/abs/2112.10752, section 4.5)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.condition._files import check_shapes, read_masks, read_pictures
from ldm.condition._masks import key_generator, random_mask
from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.types import Autoencoder, Batch, Cond, Draw, Widths


class Inpaint(Condition):
    """-> the mask, by nearest, 1 where to repaint, and the whitened latents of the picture with the hole at mid-grey.

    The order and meaning of Stable Diffusion inpainting's channels: 1 + C. The shards' masks are pictures, white where to
    repaint, or label maps, 0 where to keep; where the batch has none, one is made from the sample's key, in training also from
    its position. Never dropped: the mask is part of what is asked.
    """

    def __init__(self, autoencoder: Autoencoder, image: str = "image", mask: str = "mask", rate: float = 0.0) -> None:
        super().__init__()
        self.encode, self.factor = autoencoder.encode, autoencoder.factor
        self.rate, self.widths = rate, Widths(spatial=1 + autoencoder.channels)
        self.key = self.hole = (image, mask)

    def forward(self, value: Sequence[Tensor], drop: Tensor) -> Cond:
        """value: pictures (B, 3, f * H, f * W) in [-1, 1], masks (B, 1, f * H, f * W) of 0 and 1 -> spatial: (B, 1 + C, H, W).

        Raises:
            Refusal: masks of another size or of other numbers, or all of them empty.
        """
        image, mask = value[0], value[1].to(value[0])
        check_mask(mask, image)
        with torch.no_grad():
            known = self.encode(image * (1 - mask)).mean
        maps = torch.cat((interpolate(mask, known.shape[2:], mode="nearest"), known), dim=1)
        return Cond(spatial=maps * (~drop).to(maps, non_blocking=True)[:, None, None, None])

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Tensor]:
        """The shards' masks as 0 and 1, or one for each picture, where the batch has pictures and keys but no masks."""
        image, mask = self.key
        if mask in batch:
            return {mask: as_mask(batch[mask])}
        if image not in batch or "key" not in batch:
            return {}
        positions = [None] * len(batch["key"]) if draw is None else draw.position.tolist()
        size = tuple(batch[image].shape[2:])
        made = [random_mask(size, key_generator(key, p)) for key, p in zip(batch["key"], positions)]
        return {mask: torch.stack(made).to(batch[image].device)}

    def check(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Refuses a mask of another shape than its picture."""
        if all(field in values for field in self.key):
            check_shapes(values, *self.key)

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Files -> pictures (N, 3, height, width) in [-1, 1], or masks (N, 1, height, width), white where to repaint."""
        return (read_pictures if field == self.key[0] else read_masks)(field, values, size)

    def input(self, field: str) -> Input:
        """A picture, and a mask that is painted over it."""
        image, mask = self.key
        return Input("mask", over=image) if field == mask else Input("picture")

    def show(self, value: Sequence[Tensor]) -> Tensor:
        """value: as in `forward` -> the pictures with their holes grey."""
        return value[0] * (1 - value[1].to(value[0]))


def as_mask(value: Tensor) -> Tensor:
    """Pictures (B, 3, h, w) in [-1, 1] or labels (B, h, w) -> (B, 1, h, w) of 0 and 1; masks as they are."""
    if value.ndim == 3:
        return (value > 0).float()[:, None]
    return (value.mean(1, keepdim=True) > 0).float() if value.shape[1] == 3 else value


def check_mask(mask: Tensor, image: Tensor) -> None:
    """Raises ValueError unless mask: (B, 1, h, w) of 0 and 1, not all of them empty, fits image: (B, 3, h, w)."""
    if mask.shape[2:] != image.shape[2:] or mask.shape[1] != 1:
        raise Refusal(f"A mask of {tuple(mask.shape[1:])} does not fit a picture of {tuple(image.shape[1:])}; wanted (1, h, w).")
    if not ((mask == 0) | (mask == 1)).all():
        raise Refusal(f"A mask holds 0 (keep) and 1 (repaint) only, this one {mask.min():g} to {mask.max():g}.")
    if not mask.any():
        raise Refusal("Nothing is to be repainted in any picture: their masks are 0 everywhere (data.fields.mask).")
