"""The KL autoencoder of Latent Diffusion and Stable Diffusion (https://arxiv.org/abs/2112.10752, section 3.1, appendix G).

q(z|x) = N(mean(x), std(x)^2), x_hat = decoder(z)
KL(q || N(0, 1)) = (mean^2 + std^2 - 1 - log std^2) / 2 for each number of z

Latents leave whitened, (z - m) / s: `encode` and `decode` apply the mean m and the standard deviation s of each channel of
sampled latents over the training set, so that no other part needs a scale factor.
"""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, pad, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from ldm.errors import Refusal
from ldm.types import Draw, Moments


class KL(nn.Module):
    """(B, 3, f * H, f * W) <-> (B, channels, H, W), f = 2 ^ (levels - 1); the defaults are Stable Diffusion's KL-f8.

    The buffers `mean` and `std`, (channels), hold the statistics of sampled latents, and `count` the number of pictures that they
    were measured on, 0 until then.

    Args:
        channels: of the latents.
        width: features at the largest size.
        mult: level i has width * mult[i] features; each level but the last halves height and width.
        res_blocks: residual blocks of each level; the decoder has one more.
        groups: of the norms; they divide the features of every level.
        attention: the levels with an attention after each block, besides the one in the middle.
        checkpointing: whether activations are computed again in the backward pass, to save memory.
        quant_conv: whether 1x1 convolutions stand around the latents; Stable Diffusion 3 and Flux have none.

    Raises:
        Refusal: the groups do not divide the features.
    """

    mean: Tensor
    std: Tensor
    count: Tensor
    terms = ("kl",)  # of the bottleneck, those that have a weight

    def __init__(
        self,
        channels: int = 4,
        width: int = 128,
        mult: Sequence[int] = (1, 2, 4, 4),
        res_blocks: int = 2,
        groups: int = 32,
        attention: Sequence[int] = (),
        checkpointing: bool = False,
        quant_conv: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.factor = channels, 2 ** (len(mult) - 1)
        self.encoder = Encoder(2 * channels, width, mult, res_blocks, groups, attention, checkpointing)
        self.decoder = Decoder(channels, width, mult, res_blocks, groups, attention, checkpointing)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if quant_conv else nn.Identity()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> whitened moments of (B, C, H, W).

        Raises:
            Refusal: f does not divide the size.
        """
        return whiten(self.posterior(images), self.mean, self.std)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, f * H, f * W), about [-1, 1]."""
        return self.reconstruct(unwhiten(latents, self.mean, self.std))

    def posterior(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> moments of the network's own latents (B, C, H, W), not whitened.

        Raises:
            Refusal: f does not divide the size.
        """
        check_size(images, self.factor)
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Moments(mean, torch.exp(0.5 * log_variance.clamp(-30, 20)))

    def reconstruct(self, z: Tensor) -> Tensor:
        """(B, C, H, W), latents that are not whitened -> (B, 3, f * H, f * W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def bottleneck(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, f * H, f * W) in [-1, 1] -> sampled latents (B, C, H, W) to reconstruct from, and `kl` in nats."""
        moments = self.posterior(images)
        noise = draw.normal("posterior", moments.mean.shape[1:])
        return moments.sample(noise), {"kl": kl_divergence(moments.mean, moments.std)}

    @property
    def last_layer(self) -> nn.Parameter:
        """The last convolution's weight, on which the adaptive adversarial weight is measured."""
        return self.decoder.conv_out.weight


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """mean, std: (B, C, H, W) -> KL(N(mean, std^2) || N(0, 1)) in nats, (), the mean over all numbers, in float32."""
    mean, std = mean.float(), std.float()
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()


def whiten(raw: Moments, mean: Tensor, std: Tensor) -> Moments:
    """Moments of latents (B, C, H, W), mean and std: (C) -> whitened moments."""
    return Moments((raw.mean - mean[:, None, None]) / std[:, None, None], raw.std / std[:, None, None])


def unwhiten(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, H, W) whitened, mean and std: (C) -> latents that are not whitened."""
    return latents * std[:, None, None] + mean[:, None, None]


def check_size(images: Tensor, factor: int) -> None:
    """Refuses pictures (B, 3, height, width) whose height and width `factor` does not divide."""
    height, width = images.shape[2:]
    if height % factor or width % factor:
        crop = f"crop it to {height - height % factor}x{width - width % factor}"
        mend = crop if min(height, width) >= factor else f"{factor}x{factor} is the least"
        raise Refusal(
            f"A picture of {height}x{width} pixels cannot be encoded by an autoencoder of factor {factor}; "
            f"{mend} (data.size=...)."
        )


class Encoder(nn.Module):
    """(B, 3, f * H, f * W) -> (B, channels, H, W).

    Args:
        channels: of the output.
        width, mult, res_blocks, groups, attention, checkpointing: as in `KL`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        mult: Sequence[int],
        res_blocks: int,
        groups: int,
        attention: Sequence[int],
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.conv_in, ch = nn.Conv2d(3, width, 3, padding=1), width
        self.levels = nn.ModuleList()
        for i, m in enumerate(mult):
            blocks = level(ch, m * width, res_blocks, groups, i in attention)
            ch = m * width
            self.levels.append(nn.Sequential(*blocks, *([Downsample(ch)] if i < len(mult) - 1 else [])))
        self.middle = middle(ch, groups)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, ch, eps=1e-6), nn.Conv2d(ch, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, f * H, f * W) -> (B, channels, H, W)."""
        h = through(self.levels, self.conv_in(x), self.checkpointing)
        return self.conv_out(activate(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """(B, channels, H, W) -> (B, 3, f * H, f * W).

    Args:
        channels: of the input.
        width, mult, res_blocks, groups, attention, checkpointing: as in `KL`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        mult: Sequence[int],
        res_blocks: int,
        groups: int,
        attention: Sequence[int],
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.checkpointing, ch = checkpointing, width * mult[-1]
        self.conv_in, self.middle = nn.Conv2d(channels, ch, 3, padding=1), middle(ch, groups)
        self.levels = nn.ModuleList()
        for i, m in reversed(list(enumerate(mult))):
            blocks = level(ch, m * width, res_blocks + 1, groups, i in attention)
            ch = m * width
            self.levels.append(nn.Sequential(*blocks, *([Upsample(ch)] if i else [])))
        self.norm_out, self.conv_out = nn.GroupNorm(groups, ch, eps=1e-6), nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 3, f * H, f * W)."""
        h = self.conv_in(z.contiguous(memory_format=torch.channels_last))
        h = through(self.levels, self.middle(h), self.checkpointing)
        return self.conv_out(activate(self.norm_out(h)))


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution of the first x where the width changes."""

    def __init__(self, inward: int, outward: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inward, eps=1e-6), nn.Conv2d(inward, outward, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outward, eps=1e-6), nn.Conv2d(outward, outward, 3, padding=1)
        self.skip = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return self.skip(x) + self.conv2(activate(self.norm2(self.conv1(activate(self.norm1(x))))))


class Attention(nn.Module):
    """Self-attention of each pixel to all, with one head, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (layer(y)[:, None] for layer in (self.q, self.k, self.v))
        y = self.out(scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Conv2d):
    """A convolution that halves height and width; it pads below and to the right, as the published weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 2H, 2W) -> (B, C, H, W)."""
        return super().forward(pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles height and width by nearest-neighbour interpolation, then a convolution.

    Both in one are a transposed convolution with a kernel of 4 x 4, which sums the weights that meet the same pixel: 4/9 of the
    multiplications.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        kernel = pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
        kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
        return conv_transpose2d(x, kernel[..., 1:] + kernel[..., :-1], self.bias, stride=2, padding=1)


def activate(h: Tensor) -> Tensor:
    """SiLU of a norm's output, in place where no backward pass needs that output."""
    return silu(h, inplace=not torch.is_grad_enabled())


def middle(channels: int, groups: int) -> nn.Sequential:
    """The blocks at the smallest size: (B, C, H, W) -> (B, C, H, W)."""
    return nn.Sequential(ResBlock(channels, channels, groups), Attention(channels, groups), ResBlock(channels, channels, groups))


def level(inward: int, outward: int, count: int, groups: int, attend: bool) -> list[nn.Module]:
    """The residual blocks of one level, each with an attention behind it where there is one.

    Args:
        inward: features of the first block's input.
        outward: features of every block's output.
        count: blocks.
        groups: of the norms.
        attend: whether there is attention.

    Raises:
        Refusal: the groups do not divide the features.
    """
    if inward % groups or outward % groups:
        raise Refusal(
            f"autoencoder.groups={groups} does not divide the {inward} or {outward} features of a level (autoencoder.width times "
            f"autoencoder.mult); use autoencoder.groups={gcd(inward, outward, groups)}."
        )
    blocks: list[nn.Module] = []
    for i in range(count):
        blocks.append(ResBlock(outward if i else inward, outward, groups))
        blocks += [Attention(outward, groups)] if attend else []
    return blocks


def through(levels: nn.ModuleList, h: Tensor, checkpointing: bool) -> Tensor:
    """h: (B, C, H, W), through one level after another -> (B, C', H', W'); with `checkpointing`, activations are not kept."""
    for block in levels:
        h = checkpoint(block, h, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(h)
    return h
