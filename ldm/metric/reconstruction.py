"""PSNR of an autoencoder's reconstructions."""

import torch
from torch import Tensor

from ldm.types import Batch


class Reconstruction:
    """Mean over pictures of 10 log10(peak^2 / MSE), peak-to-peak 2, in dB; decoded from the posterior's mean."""

    of = "reconstruction"

    def __init__(self) -> None:
        self.psnr: list[Tensor] = []

    def prepare(self, data: object) -> None:
        """Needs nothing beforehand."""

    def update(self, images: Tensor, batch: Batch) -> None:
        """images: (B, 3, h, w) reconstructions in [-1, 1]; batch: image, the originals."""
        error = (images - batch["image"]).square().mean((1, 2, 3)).clamp(min=1e-10)
        self.psnr.append(10 * torch.log10(4 / error.cpu()))

    def compute(self) -> dict[str, float]:
        """-> {"reconstruction_psnr": dB}."""
        return {"reconstruction_psnr": torch.cat(self.psnr).mean().item()}
