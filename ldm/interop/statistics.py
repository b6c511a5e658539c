"""The scale factor of published latents, and the statistics of ours, which are the same thing told by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.interop.bundle import Part


def published_statistics(
    channels: int, scale: float, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0
) -> dict[str, Tensor]:
    """A published scale factor, and means and deviations by channel, as statistics: z = mean + x std / scale.

    How many pictures they come from nobody says: -1.

    Raises:
        Refusal: they are not one for each channel.
    """
    by_channel = [torch.tensor(x, dtype=torch.float64) for x in (mean, std)]
    if any(x.shape not in ((), (channels,)) for x in by_channel):
        raise Refusal(f"latents_mean={mean}, latents_std={std}: one for each of {channels} channels was wanted.")
    mean, std = (x.expand(channels) for x in by_channel)
    return {"mean": mean.float().clone(), "std": (std / scale).float(), "count": torch.tensor(-1)}


def scale_of(part: Part) -> tuple[float, float] | None:
    """The published scale factor and shift that an autoencoder's statistics are, or None: they are measured, per channel."""
    mean, std = part.weights["mean"], part.weights["std"]
    if bool((mean != mean[0]).any()) or bool((std != std[0]).any()):
        return None
    scale, shift = 1 / float(std[0]), float(mean[0])
    short, shorter = float(f"{scale:.6g}"), float(f"{shift:.6g}")
    return short if torch.tensor(1 / short) == std[0] else scale, shorter if torch.tensor(shorter) == mean[0] else shift


def folded(part: Part) -> dict[str, Tensor]:
    """A KL autoencoder's weights with its statistics inside, so that its own latents are white and the scale factor is 1.

    The two 1x1 convolutions around the latents take them up, exactly but for rounding; one without them gets them.

    Raises:
        Refusal: it is a VQ, where other scales by channel would choose other codes.
    """
    if "codebook" in part.weights:
        raise Refusal("A VQ autoencoder's statistics differ by channel; other layouts know one scale factor for all channels.")
    w, count = dict(part.weights), len(part.weights["mean"])
    for name, size in (("quant_conv", 2 * count), ("post_quant_conv", count)) if "quant_conv.weight" not in w else ():
        w |= {f"{name}.weight": torch.eye(size)[:, :, None, None], f"{name}.bias": torch.zeros(size)}
    mean, std = w["mean"], w["std"]
    scale, move = torch.cat((1 / std, torch.ones_like(std))), torch.cat((mean / std, 2 * std.log()))
    w["quant_conv.weight"] = w["quant_conv.weight"] * scale[:, None, None, None]
    w["quant_conv.bias"] = w["quant_conv.bias"] * scale - move
    w["post_quant_conv.bias"] = w["post_quant_conv.bias"] + w["post_quant_conv.weight"][:, :, 0, 0] @ mean
    w["post_quant_conv.weight"] = w["post_quant_conv.weight"] * std[:, None, None]
    return w
