"""Stage 2: trains an autoencoder, then measures the statistics that whiten its latents."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.folder import save_model
from ldm.training.stage import Stage, reduce_sum
from ldm.types import Batch, Draw


class Autoencoding(Stage):
    """L1 + L2 + perceptual + KL (https://arxiv.org/abs/2112.10752, equation 25, without the adversary).

    `perceptual`: (images, targets) -> distance, or None. Each weight multiplies a mean, over pixels or over latent numbers,
    where the KL is in nats; L1 has weight 1. `flip` is the share of training pictures that are mirrored.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        perceptual: nn.Module | None,
        perceptual_weight: float,
        kl_weight: float,
        l2_weight: float = 0.0,
        flip: float = 0.0,
        **stage: Any,
    ) -> None:
        super().__init__(frozen=("perceptual",), **stage)
        self.autoencoder, self.perceptual = autoencoder, perceptual
        self.perceptual_weight, self.kl_weight, self.l2_weight = perceptual_weight, kl_weight, l2_weight
        self.flip = flip

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """batch: image (B, 3, h, w) -> loss and its terms, and in validation the PSNR of decoded means, in dB."""
        images = batch["image"]
        if self.training and self.flip:
            mirrored = (draw.uniform("flip") < self.flip).to(images.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        posterior = self.autoencoder.posterior(images)
        z = posterior.sample(draw.normal("posterior", posterior.mean.shape[1:]))
        output = self.autoencoder.reconstruct(z)
        terms = {"l1": (output - images).abs().mean(), "kl": kl_divergence(posterior.mean, posterior.std)}
        terms["l2"] = (output - images).square().mean()
        loss = terms["l1"] + self.l2_weight * terms["l2"] + self.kl_weight * terms["kl"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, images)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if not self.training:
            error = (self.autoencoder.reconstruct(posterior.mean).clamp(-1, 1) - images).square().mean((1, 2, 3))
            terms["psnr"] = (10 * torch.log10(4 / error.clamp(min=1e-10))).mean()
        return {"loss": loss, **terms}

    @torch.no_grad()
    def finish(self, data: Any) -> None:
        """Measures mean and standard deviation of sampled latents over the training set, per channel, over all ranks.

        Exact over the sampling noise: E[z] = E[mean], Var[z] = E[mean^2 + std^2] - E[mean]^2. Sums are float64.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        sums = torch.zeros(3, self.autoencoder.channels, dtype=torch.float64, device=self.device)
        pictures = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in data.ordered("train", batch=64, rank=rank, world=world):
            batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, self.device, 0), 0)
            moments = self.autoencoder.posterior(batch["image"])
            mean, std = moments.mean.double(), moments.std.double()
            sums += torch.stack((torch.ones_like(mean), mean, mean.square() + std.square())).sum((1, 3, 4))
            pictures += len(mean)
        count, total, square = reduce_sum(sums)
        mean = total / count
        self.autoencoder.mean.copy_(mean)
        self.autoencoder.std.copy_((square / count - mean.square()).sqrt())
        self.autoencoder.count.copy_(reduce_sum(pictures))

    def export(self, folder: Path) -> None:
        """Writes model.safetensors, the statistics with it, and config.json."""
        save_model(self.autoencoder.state_dict(), self.recipe, folder)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) in nats, (B, C, H, W) each -> (), the mean over all latent numbers."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
