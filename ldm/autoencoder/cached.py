"""Latents from shards: an autoencoder that training never runs, and that is read only when something must be drawn."""

from collections.abc import Callable

from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.types import Autoencoder, Moments


class Cached(nn.Module):
    """Stands in for the autoencoder that the shards' moments were made with (precompute.py), of which it knows only the sizes.

    `load` reads it the first time that latents are decoded. So a training takes none of its memory until a picture is drawn.
    """

    def __init__(self, load: Callable[[], Autoencoder], channels: int, factor: int) -> None:
        super().__init__()
        self.load, self.channels, self.factor = load, channels, factor
        self.kept: list[Autoencoder] = []  # in a list, so that it is no part of this module

    def encode(self, images: Tensor) -> Moments:
        """Refuses: the latents are in the shards.

        Raises:
            Refusal: always.
        """
        raise Refusal(
            "autoencoder=cached encodes no pictures: train on latents (data=latents data.train=...), or with autoencoder=trained."
        )

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, f * H, f * W), about [-1, 1].

        Raises:
            Refusal: the autoencoder has other sizes than this was told.
        """
        if not self.kept:
            found = self.load().to(latents.device)
            self.compare(found)
            self.kept.append(found.requires_grad_(False))
        return self.kept[0].to(latents.device).decode(latents)

    def original(self) -> Autoencoder:
        """The autoencoder itself, compared with what this was told of it; it is not kept."""
        found = self.load()
        self.compare(found)
        return found

    def compare(self, found: Autoencoder) -> None:
        """Compares the autoencoder that was loaded with what this was told of it.

        Raises:
            Refusal: it has other sizes.
        """
        if (found.channels, found.factor) != (self.channels, self.factor):
            raise Refusal(
                f"autoencoder.channels={self.channels} autoencoder.factor={self.factor}, but the autoencoder in "
                f"autoencoder.load.path has {found.channels} and {found.factor}; say these."
            )
