"""The representation autoencoder, RAE (https://arxiv.org/abs/2510.11690): a frozen encoder, and a decoder that is trained.

z = encoder(x),   x_hat = decoder(z + tau u n) in training, u uniform in [0, 1] for each picture, n unit normal (section 3.3)

The latents are the encoder's features of each patch, whitened place by place. The encoder is a part of the autoencoder: an
exported folder holds it, so that it is loaded without the internet. A checkpoint leaves it out; `weights` says where it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.autoencoder._encoder import published
from ldm.errors import Refusal
from ldm.nn.empty import is_weightless
from ldm.nn.transformer import sinusoidal_positions
from ldm.nn.vit import Block, ViT
from ldm.types import Draw, Moments

EPS = 1e-12  # of the decoder's norms


class RAE(nn.Module):
    """(B, 3, f * side, f * side) <-> (B, channels, side, side), of this one size; the defaults are DINOv2-B's and a ViT-XL's.

    The buffers `mean` and `std`, (channels, side, side), hold the statistics of the features over the training set, and `count`
    the number of pictures that they were measured on, 0 until then.

    Args:
        encoder: the network of the features, whose width are the channels.
        weights: where the encoder's are from: a folder or repository of transformers, or an exported autoencoder of this kind.
            With None they are random until others are loaded. What loads a whole exported folder does not read them.
        side: latents a side. Pictures are resized to `side` patches of the encoder.
        factor: pixels a side that the decoder makes of a latent, f.
        width, depth, heads, inner: of the decoder, as in `ViT`.
        span: rows and columns that the decoder's positions are counted over: 16 in diffusers at every size, `side` in the
            authors' own code, which at 512 pixels is 32.
        noise: the largest noise of the latents that the decoder learns from, tau.
        pixel_mean, pixel_std: of each colour in [0, 1], by which the encoder's pictures are normalised.

    Raises:
        Refusal: the weights are of another network, or noise is negative. NotFound, Unreachable: they are not there.
    """

    frozen = ("encoder",)
    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(
        self,
        encoder: ViT,
        weights: str | None = None,
        side: int = 16,
        factor: int = 16,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        inner: int = 4096,
        span: int = 16,
        noise: float = 0.8,
        pixel_mean: Sequence[float] = (0.485, 0.456, 0.406),
        pixel_std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if noise < 0:
            raise Refusal(f"autoencoder.noise={noise}: the largest deviation of the noise is 0 or more.")
        self.channels, self.factor, self.side, self.noise = encoder.width, factor, side, noise
        self.encoder = encoder.requires_grad_(False)
        if weights is not None and not is_weightless():
            encoder.load_state_dict(published(weights, encoder))
        self.decoder = Decoder(self.channels, side, width, depth, heads, inner, factor, span)
        for name, colours in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(list(colours))[:, None, None], persistent=False)
        self.register_buffer("mean", torch.zeros(self.channels, side, side))
        self.register_buffer("std", torch.ones(self.channels, side, side))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * side, f * side) in [-1, 1] -> whitened latents (B, C, side, side), as moments with deviation 0.

        Raises:
            Refusal: the pictures have another size.
        """
        raw = self.posterior(images)
        return Moments((raw.mean - self.mean) / self.std, raw.std)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, side, side) whitened -> (B, 3, f * side, f * side), about [-1, 1].

        Raises:
            Refusal: the latents have another size.
        """
        check_side(latents, self.side, "Latents", "size")
        return self.reconstruct(latents * self.std + self.mean)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Moments:
        """(B, 3, f * side, f * side) in [-1, 1] -> the encoder's features (B, C, side, side), as moments with deviation 0.

        Raises:
            Refusal: the pictures have another size.
        """
        check_side(images, self.side * self.factor, "Pictures", "data.size")
        pixels, wanted = (images + 1) / 2, (self.side * self.encoder.patch,) * 2
        if pixels.shape[2:] != wanted:
            pixels = interpolate(pixels, wanted, mode="bicubic")
        z = self.encoder((pixels - self.pixel_mean) / self.pixel_std)
        return Moments(z, torch.zeros_like(z))

    def reconstruct(self, z: Tensor) -> Tensor:
        """(B, C, side, side), features that are not whitened -> (B, 3, f * side, f * side), about [-1, 1]."""
        return (self.decoder(z) * self.pixel_std + self.pixel_mean) * 2 - 1

    def bottleneck(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, f * side, f * side) in [-1, 1] -> features (B, C, side, side), in training with noise, and no terms."""
        z = self.posterior(images).mean
        if not self.training or not self.noise:
            return z, {}
        levels = self.noise * draw.uniform("noise level").to(z, non_blocking=True)[:, None, None, None]
        return z + levels * draw.normal("noise", z.shape[1:]).to(z, non_blocking=True), {}

    @property
    def last_layer(self) -> nn.Parameter:
        """The last layer's weight, on which the adaptive adversarial weight is measured."""
        return self.decoder.out.weight


class Decoder(nn.Module):
    """Features (B, C, side, side) -> colours as the encoder's pictures are normalised, (B, 3, f * side, f * side).

    The decoder of a masked autoencoder (https://arxiv.org/abs/2111.06377), that is given every patch.

    Args:
        channels: of the features, C.
        side: of them.
        width, depth, heads, inner: as in `ViT`.
        factor: pixels a side of a patch, f.
        span: rows and columns that positions are counted over.
    """

    position: Tensor

    def __init__(self, channels: int, side: int, width: int, depth: int, heads: int, inner: int, factor: int, span: int) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise Refusal(f"autoencoder.width={width} must divide into heads={heads}, and by 4.")
        self.factor, self.embed = factor, nn.Linear(channels, width)
        self.first = nn.Parameter(torch.zeros(width))
        self.register_buffer("position", sinusoidal_positions(side, side, width, (span, span)), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, inner, EPS) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width, eps=EPS), nn.Linear(width, 3 * factor**2)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, side, side) -> (B, 3, f * side, f * side)."""
        h = self.embed(z.flatten(2).transpose(1, 2)) + self.position
        h = torch.cat((self.first.to(h).expand(len(h), 1, -1), h), dim=1)
        for block in self.blocks:
            h = block(h)
        patches = self.out(self.norm(h[:, 1:])).unflatten(1, z.shape[2:]).unflatten(-1, (self.factor, self.factor, 3))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(z), 3, *(n * self.factor for n in z.shape[2:]))


def check_side(x: Tensor, side: int, what: str, setting: str) -> None:
    """Refuses pictures or latents, (B, C, height, width), that are not `side` x `side`."""
    if tuple(x.shape[2:]) != (side, side):
        raise Refusal(
            f"{what} of {x.shape[2]}x{x.shape[3]}: a representation autoencoder is of one size, here {side}x{side} "
            f"({setting}={side})."
        )
