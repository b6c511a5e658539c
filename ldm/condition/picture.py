"""Any other picture of the scene, such as depth or edges, as maps beside the latents."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm.condition._of_picture import OfPicture
from ldm.types import Autoencoder, Cond, Widths


class Picture(OfPicture):
    """A picture -> maps at latent resolution: `encoded` by the model's own autoencoder, or `pooled` by area, channel by channel.

    A dropped picture is zeros.
    """

    def __init__(
        self, autoencoder: Autoencoder, how: Literal["encoded", "pooled"] = "encoded", key: str = "depth", rate: float = 0.1
    ) -> None:
        super().__init__()
        self.encode, self.factor, self.how, self.key, self.rate = autoencoder.encode, autoencoder.factor, how, key, rate
        self.widths = Widths(spatial=autoencoder.channels if how == "encoded" else 3)

    def forward(self, value: Tensor, drop: Tensor) -> Cond:
        """value: (B, 3, f * H, f * W) in [-1, 1], drop: (B) bool -> spatial: (B, C', H, W), whitened latents or colours."""
        with torch.no_grad():
            maps = self.encode(value).mean if self.how == "encoded" else avg_pool2d(value, self.factor)
        return Cond(spatial=maps * (~drop).to(maps, non_blocking=True)[:, None, None, None])
