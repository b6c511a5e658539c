"""PSNR of an autoencoder's reconstructions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.measure import Estimate, Reference, Rows
from ldm.types import Batch


class Reconstruction:
    """Mean over pictures of 10 log10(peak^2 / MSE), peak-to-peak 2, in dB; decoded from the posterior's mean."""

    of, against = "reconstruction", None

    def __init__(self) -> None:
        self.protocol = {"extractor": "psnr"}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) reconstructions in [-1, 1]; batch: image, the originals -> psnr: (B), in dB."""
        error = (images - batch["image"]).square().mean((1, 2, 3)).clamp(min=1e-10)
        return {"psnr": 10 * torch.log10(4 / error)}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> {"reconstruction_psnr": dB}."""
        return {"reconstruction_psnr": Estimate.mean(rows["psnr"])}
