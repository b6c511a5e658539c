"""An autoencoder for training on precomputed latents: it is never run, and loaded only when pictures must be decoded."""

from collections.abc import Callable

from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Autoencoder, Moments


class Cached(nn.Module):
    """Stands in for the autoencoder that the shards' moments were made with (precompute.py): (B, C, H, W) -> pictures.

    `load` loads that one when latents are decoded for the first time, so that training takes none of its memory before.
    `channels`, C, and `factor`, f, must be those of the loaded one.
    """

    def __init__(self, load: Callable[[], Autoencoder], channels: int, factor: int) -> None:
        super().__init__()
        self.load, self.channels, self.factor = load, channels, factor
        self.kept: list[Autoencoder] = []  # in a list, so that it is no part of this module

    def encode(self, images: Tensor) -> Moments:
        """Refuses, since the latents are in the shards.

        Raises:
            Refusal: always.
        """
        raise Refusal(
            "autoencoder=cached encodes no pictures: train on latents (data=latents data.train=...), or with autoencoder=trained."
        )

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, f * H, f * W), about [-1, 1].

        Raises:
            Refusal: the loaded autoencoder has other sizes.
        """
        if not self.kept:
            self.kept.append(self.original().to(latents.device).requires_grad_(False))
        return self.kept[0].to(latents.device).decode(latents)

    def original(self) -> Autoencoder:
        """-> the autoencoder itself, loaded anew.

        Raises:
            Refusal: it has other sizes.
        """
        loaded = self.load()
        if (loaded.channels, loaded.factor) != (self.channels, self.factor):
            raise Refusal(
                f"autoencoder.channels={self.channels} autoencoder.factor={self.factor}, but the autoencoder in "
                f"autoencoder.load.path has {loaded.channels} and {loaded.factor}; say these."
            )
        return loaded
