"""A depth map beside the latents, as Stable Diffusion 2's depth model is told it."""

from torch import Tensor
from torch.nn.functional import interpolate

from ldm.condition._of_picture import OfPicture
from ldm.types import Autoencoder, Cond, Widths


class DepthMap(OfPicture):
    """A grey picture -> one map at latent resolution, by bicubic interpolation, then stretched to [-1, 1] picture by picture.

    Near is white (inverse depth, as MiDaS tells it). Never dropped, as published: the null sees it as well.
    """

    def __init__(self, autoencoder: Autoencoder, key: str = "depth", rate: float = 0.0) -> None:
        super().__init__()
        self.factor, self.key, self.rate, self.widths = autoencoder.factor, key, rate, Widths(spatial=1)

    def forward(self, value: Tensor, drop: Tensor) -> Cond:
        """value: (B, 1 or 3, f * H, f * W) of any range, drop: (B) bool -> spatial: (B, 1, H, W); a flat picture is zeros."""
        size = [side // self.factor for side in value.shape[2:]]
        depth = interpolate(value.mean(dim=1, keepdim=True), size, mode="bicubic")
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        stretched = (2 * depth - low - high) / (high - low).clamp(min=1e-6)
        return Cond(spatial=stretched * (~drop).to(stretched, non_blocking=True)[:, None, None, None])

    def show(self, value: Tensor) -> Tensor:
        """value: as in `forward` -> (B, 3, f * H, f * W)."""
        return value.expand(-1, 3, -1, -1)
