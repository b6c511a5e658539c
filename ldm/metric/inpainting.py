"""How well a hole is filled: against the picture that was there, and against the mean colour of its known part.

PSNR = 10 log10(4 / MSE) in dB, for pixels in [-1, 1]
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Reference, Rows
from ldm.types import Batch


class Inpainting:
    """Means of PSNR over the pictures whose mask is neither empty nor full."""

    of, against = "drawing", None

    def __init__(self) -> None:
        self.protocol = {"extractor": "psnr inside and outside of the mask"}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: image, mask (B, 1, h, w), 1 in the hole -> hole, known, mean: (B), in dB.

        Raises:
            Refusal: the requests have no mask.
        """
        if "mask" not in batch:
            raise Refusal(f"inpainting reads the field 'mask', and there is only {sorted(batch)} (condition=[inpaint]).")
        real, hole = batch["image"], batch["mask"].to(images)
        colour = (real * (1 - hole)).sum((2, 3), keepdim=True) / (1 - hole).sum((2, 3), keepdim=True)
        return {
            "hole": psnr_where(images, real, hole),
            "mean": psnr_where(colour.expand_as(real), real, hole),
            "known": psnr_where(images, real, 1 - hole),
        }

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> in dB: `inpainting_psnr` inside the hole, `inpainting_psnr_of_mean_colour` of the known part's mean colour there,
        `inpainting_gain`, the difference of the two, and `inpainting_known_psnr` outside, which the autoencoder limits.
        """
        hole, mean = rows["hole"], rows["mean"]
        numbers = {"psnr": hole, "psnr_of_mean_colour": mean, "gain": hole - mean, "known_psnr": rows["known"]}
        return {
            f"inpainting_{name}": Estimate.mean(values[mean.isfinite() & hole.isfinite()]) for name, values in numbers.items()
        }


def psnr_where(images: Tensor, real: Tensor, where: Tensor) -> Tensor:
    """images, real: (B, 3, h, w) in [-1, 1], where: (B, 1, h, w) of 0 and 1 -> (B), in dB, at most 60."""
    error = ((images - real).square().mean(1, keepdim=True) * where).sum((1, 2, 3)) / where.sum((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=4e-6))
