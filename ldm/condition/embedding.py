"""A picture's embedding in a frozen CLIP: variations of a picture."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.condition._of_picture import OfPicture
from ldm.tower.clip import load_clip, preprocess
from ldm.types import Cond, Widths


class Embedding(OfPicture):
    """A picture -> its unit-length CLIP embedding times sqrt(E), as a vector, or as one token of width E. Dropped: zeros.

    Args:
        model, pretrained: open_clip's: a name with a tag or a local file; or `local-dir:FOLDER` and None.
        slot: whether the embedding is one token or a vector.
        key: the field of the picture.
        rate: the share of samples for which it is dropped in training, in [0, 1].
    """

    frozen = unreached = ("tower",)

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        slot: Literal["tokens", "vector"] = "tokens",
        key: str = "image",
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.tower = load_clip(model, pretrained, "condition.embedding").visual
        self.key, self.rate, self.slot = key, rate, slot
        self.widths = Widths(**{slot: self.tower.output_dim})

    def forward(self, value: Tensor, drop: Tensor) -> Cond:
        """value: (B, 3, h, w) in [-1, 1], drop: (B) bool -> tokens: (B, 1, E), or vector: (B, E), of unit variance."""
        with torch.no_grad():
            feature = self.tower(preprocess(self.tower, value))
        feature = normalize(feature, dim=1) * feature.shape[1] ** 0.5 * (~drop).to(feature, non_blocking=True)[:, None]
        return Cond(vector=feature) if self.slot == "vector" else Cond(tokens=feature[:, None])
