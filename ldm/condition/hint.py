"""The picture that a ControlNet follows: edges, depth, a pose (https://arxiv.org/abs/2302.05543, section 3.2)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from typing import Any, Literal
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.condition._files import check_shapes, numbers, read_greys, read_pictures, shrunk
from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.nn.layers import zero
from ldm.types import Autoencoder, Batch, Cond, Draw, Widths

THIN = 4  # times that a picture may be scaled down before its lines are lost
CHANNELS = (16, 32, 96, 256)  # of the published ones


class Hint(Condition):
    """A control picture -> maps at latent resolution: its features and, last, the strength at which the ControlNet speaks.

    The network sees colours in [0, 1]. A dropped hint has strength 0: the ControlNet says nothing.

    Args:
        autoencoder: the model's, whose factor the features are brought to.
        width: of the features, that of the U-Net's first level.
        key: the field of the picture; its strength is the field `<key>_strength`, a number or a picture (white: 1), for each.
        strength: where the request does not say one.
        channels: between the convolutions, one more than the autoencoder halves; None takes the published ones' first.
        order: of colours, as the ControlNet was trained.
        rate: the share of samples for which the picture is dropped in training, in [0, 1].

    Raises:
        Refusal: it would halve more or less often than the autoencoder.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        width: int,
        key: str,
        strength: float = 1.0,
        channels: Sequence[int] | None = None,
        order: Literal["rgb", "bgr"] = "rgb",
        rate: float = 0.0,
    ) -> None:
        super().__init__()
        halved = round(log2(autoencoder.factor))
        channels = CHANNELS[: halved + 1] if channels is None else tuple(channels)
        if len(channels) != halved + 1:
            raise Refusal(f"Hint halves {len(channels) - 1} times, this autoencoder {halved} (adapter.controlnet.hint.channels).")
        self.key, self.rate, self.order, self.strength = (key, f"{key}_strength"), rate, order, strength
        self.widths = Widths(spatial=width + 1)
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1), nn.SiLU()]
        for inward, outward in pairwise(channels):
            layers += [nn.Conv2d(inward, inward, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(inward, outward, 3, padding=1, stride=2), nn.SiLU()]
        self.layers = nn.Sequential(*layers, zero(nn.Conv2d(channels[-1], width, 3, padding=1)))

    def forward(self, value: Sequence[Tensor], drop: Tensor) -> Cond:
        """value: (B, 3, f * H, f * W) in [-1, 1], and strengths (B) or (B, 1, h, w) -> spatial: (B, width + 1, H, W).

        drop: (B) bool.

        Raises:
            Refusal: labels in the place of colours.
        """
        if value[0].ndim != 4:
            raise Refusal(
                f"The field '{self.key[0]}' holds labels, {tuple(value[0].shape)}; control pictures have colours: a member of "
                f"another name than map.png (data.fields.{self.key[0]}=edges.png)."
            )
        picture, strength = (x.to(self.layers[0].weight, non_blocking=True) for x in value)
        features = self.layers((picture.flip(1) if self.order == "bgr" else picture) / 2 + 0.5)
        if strength.ndim == 1:
            strength = strength[:, None, None, None].expand(-1, 1, *features.shape[2:])
        strength = (
            interpolate(strength, features.shape[2:], mode="area") if strength.shape[2:] != features.shape[2:] else strength
        )
        strength = strength * (~drop).to(strength, non_blocking=True)[:, None, None, None]
        return Cond(spatial=torch.cat((features, strength), dim=1))

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """The usual strength, where there is a picture and none is said."""
        picture, strength = self.key
        if picture not in batch or strength in batch:
            return {}
        return {strength: torch.full((len(batch[picture]),), self.strength)}

    def check(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Refuses a request without a control picture, or with one of another shape than the picture to begin from."""
        picture = self.key[0]
        if picture not in values:
            raise Refusal(f"ask.{picture}=FILE must be said: {picture} is a ControlNet, which follows a picture.")
        if "init" in values:
            check_shapes(values, picture, "init")

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Files of pictures, or folders of them -> (N, 3, height, width) in [-1, 1]; strengths, numbers -> (N), or files of
        pictures -> (N, 1, height, width) in [0, 1]."""
        if field == self.key[0]:
            pictures = read_pictures(field, values, size, ground="black")
            if (times := shrunk(field, values, size)) > THIN:
                advice = f"thin lines grow faint: make it {size[1]}x{size[0]}"
                warn(f"ask.{field}: a picture is scaled down {times:.3g} times, and {advice}.", stacklevel=2)
            if flat := [i for i, picture in enumerate(pictures) if picture.amin() == picture.amax()]:
                warn(f"ask.{field}: picture {flat[0]} is of one colour, which tells a ControlNet nothing.", stacklevel=2)
            return pictures
        if any(_is_number(one) for one in values):
            return numbers(field, values)
        return read_greys(field, values, size)

    def input(self, field: str) -> Input:
        """A picture, and a number: how strongly it is followed."""
        return Input("picture") if field == self.key[0] else Input("number", low=0, high=2, usual=self.strength)

    def show(self, value: Sequence[Tensor]) -> Tensor:
        """value: as in `forward` -> the pictures."""
        return value[0]


def _is_number(one: Any) -> bool:
    try:
        float(one)
    except (TypeError, ValueError):
        return False
    return True
