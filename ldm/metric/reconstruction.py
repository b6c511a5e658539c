"""PSNR and SSIM of pictures against their originals.

PSNR = 10 log10(4 / MSE) in dB, for pixels in [-1, 1];  SSIM: Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861), equation
13, with a Gaussian of 11 pixels and sigma 1.5, K1 = 0.01 and K2 = 0.03
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.errors import Refusal
from ldm.measure import Estimate, Reference, Rows
from ldm.types import Batch


class Reconstruction:
    """The means over pictures of PSNR and SSIM.

    `of` is `reconstruction`, or `drawing`, which compares with the picture that the request came from.
    """

    against = None

    def __init__(self, of: str = "reconstruction") -> None:
        self.of, self.protocol = of, {"extractor": "psnr and ssim of 8-bit pictures"}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: image, the originals -> psnr: (B), in dB, ssim: (B).

        Raises:
            Refusal: the sizes differ.
        """
        original = batch["image"]
        if images.shape != original.shape:
            raise Refusal(
                f"Pictures of {tuple(images.shape[2:])} pixels cannot be held against originals of {tuple(original.shape[2:])}."
            )
        error = (images - original).square().mean((1, 2, 3)).clamp(min=1e-10)
        ssim = structural_similarity_index_measure(images.contiguous(), original.contiguous(), data_range=2.0, reduction="none")
        return {"psnr": 10 * torch.log10(4 / error), "ssim": ssim.reshape(-1)}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `<of>_psnr` in dB and `<of>_ssim`."""
        return {f"{self.of}_{name}": Estimate.mean(rows[name]) for name in ("psnr", "ssim")}
