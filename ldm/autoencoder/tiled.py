"""Large pictures in little memory: latents are decoded one picture and one tile at a time, and the tiles are blended.

x = sum_k w_k decode(z_k) / sum_k w_k over the tiles k, with weights w that rise and fall linearly over the shared pixels
"""

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Autoencoder, Moments


class Tiled(nn.Module):
    """An autoencoder around an autoencoder, which decodes tiles of `tile` x `tile` latents that share `overlap` with the next.

    A tile does not see the whole picture, as attention and group norms would, so that the result differs a little from decoding
    at once; docs/autoencoder.md says how much.

    Raises:
        Refusal: the overlap is not in [0, tile / 2].
    """

    def __init__(self, autoencoder: Autoencoder, tile: int = 64, overlap: int = 16) -> None:
        super().__init__()
        if not 0 <= overlap <= tile // 2:
            raise Refusal(f"autoencoder.overlap={overlap}: wanted 0 to {tile // 2}, half of autoencoder.tile={tile}.")
        self.autoencoder, self.tile, self.overlap = autoencoder, tile, overlap
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> whitened moments of (B, C, H, W), all at once."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, f * H, f * W), about [-1, 1]."""
        return torch.cat([self._decode_one(latent[None]) for latent in latents])

    def _decode_one(self, latent: Tensor) -> Tensor:
        height, width = latent.shape[2:]
        total, weights = 0.0, 0.0
        for top in self.starts(height):
            for left in self.starts(width):
                part = latent[:, :, top : top + self.tile, left : left + self.tile]
                weight = self.ramp(part.shape[2], top, height)[:, None] * self.ramp(part.shape[3], left, width)
                picture = self.autoencoder.decode(part)
                if not isinstance(total, Tensor):
                    total = picture.new_zeros(*picture.shape[:2], height * self.factor, width * self.factor)
                    weights = picture.new_zeros(total.shape[2:])
                weight, rows, columns = weight.to(picture), *(slice(s * self.factor, None) for s in (top, left))
                total[:, :, rows, columns][:, :, : picture.shape[2], : picture.shape[3]] += picture * weight
                weights[rows, columns][: picture.shape[2], : picture.shape[3]] += weight
        return total / weights

    def starts(self, length: int) -> list[int]:
        """-> where tiles begin along a side of `length` latents; the last one ends where the side ends."""
        if length <= self.tile:
            return [0]
        return [*range(0, length - self.tile, self.tile - self.overlap), length - self.tile]

    def ramp(self, size: int, start: int, length: int) -> Tensor:
        """-> the weights of a tile's pixels along one side, (f * size): rising at its beginning and falling at its end, save
        where these are the picture's edges. The tile has `size` latents from `start` on, of `length` in all.
        """
        pixels, shared = torch.arange(size * self.factor) + 0.5, max(self.overlap * self.factor, 1)
        up = torch.ones_like(pixels) if start == 0 else (pixels / shared).clamp(max=1)
        down = torch.ones_like(pixels) if start + size == length else (pixels.flip(0) / shared).clamp(max=1)
        return up * down
