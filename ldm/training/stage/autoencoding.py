"""Stage 2: trains an autoencoder, then measures the statistics that whiten its latents."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.errors import Refusal
from ldm.files.folder import save_model, write_json
from ldm.training.base import Stage, reduce_sum
from ldm.training.callback.guard import unless
from ldm.training.protocols import Quantised, Trainable
from ldm.training.stage.adversary import Adversary
from ldm.types import Batch, DataModule, Draw, Freezes


class Autoencoding(Stage):
    """L1 + L2 + perceptual + KL or codebook + adversary (https://arxiv.org/abs/2112.10752, equation 25).

    Args:
        autoencoder: what is trained.
        perceptual: (images, targets) -> distance; None for none.
        perceptual_weight: of its mean.
        kl_weight: of the KL divergence in nats, a mean over latent numbers. The paper's, which multiplies a sum beside a sum
            over pixels, is channels / (3 f^2) of its value here.
        l2_weight: of the mean squared error; L1 has weight 1.
        codebook_weight: of the codebook's terms, of an autoencoder that has one.
        adversary: a discriminator; None for none.
        log_variance: the first value of a learned number s, with which the reconstruction's terms count as terms / exp(s) + s;
            without it they count as they are.
        augment: (images, draw) -> images, changes those it trains on; None: as they are.
        perceptual_share: in training the perceptual distance is the mean over the first so much of a batch's pictures, in (0,
            1]: it takes as long as a small autoencoder.
        **stage: as in Stage.
    """

    trains = "autoencoder"
    compiled = ("autoencoder.encoder", *(f"autoencoder.decoder.{part}" for part in ("middle", "levels", "blocks")))

    def __init__(
        self,
        autoencoder: Trainable,
        perceptual: nn.Module | None,
        perceptual_weight: float,
        kl_weight: float,
        l2_weight: float = 0.0,
        codebook_weight: float = 1.0,
        adversary: Adversary | None = None,
        log_variance: float | None = None,
        augment: Callable[[Tensor, Draw], Tensor] | None = None,
        perceptual_share: float = 1.0,
        **stage: Any,
    ) -> None:
        frozen = [f"autoencoder.{part}" for part in autoencoder.frozen] if isinstance(autoencoder, Freezes) else []
        super().__init__(frozen=("perceptual", *frozen), **stage)
        self.autoencoder, self.perceptual, self.adversary = autoencoder, perceptual, adversary
        here = {name for name, _ in self.named_modules()}
        self.compiled = tuple(name for name in type(self).compiled if name in here)
        self.perceptual_weight, self.l2_weight = perceptual_weight, l2_weight
        self.latent_weights = {"kl": kl_weight, "codebook": codebook_weight}
        self.log_variance = None if log_variance is None else nn.Parameter(torch.tensor(float(log_variance)))
        self.augment, self.perceptual_share = augment, perceptual_share
        if not 0 < perceptual_share <= 1:
            raise Refusal(
                f"training.perceptual_share={perceptual_share}: wanted more than 0, and at most 1; the distance is left out "
                "by training.perceptual=null."
            )
        self.measured: dict[str, Any] = {}
        self.resumed: dict[str, Any] | None = None

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """batch: image (B, 3, h, w) -> loss and its terms, and in validation PSNR in dB and SSIM of what is decoded."""
        images = batch["image"] if self.augment is None or not self.training else self.augment(batch["image"], draw)
        z, latent = self.autoencoder.bottleneck(images, draw)
        output = self.autoencoder.reconstruct(z)
        loss, terms = self.reconstruction(output, images)
        opposition = 0.0
        if self.training and self.adversary is not None and self.trainer.global_step >= self.adversary.start:
            opposition, heard = self.adversary.oppose(output, loss, self.autoencoder.last_layer)
            terms |= heard | self.adversary.learn(images, output.detach(), self.trainer)
        loss = loss + sum(self.latent_weights.get(name, 0.0) * term for name, term in latent.items()) + opposition
        if not self.training:
            terms |= fidelity(self.autoencoder.decode(self.autoencoder.encode(images).mean).clamp(-1, 1), images)
        return {"loss": loss, **terms, **latent}

    def reconstruction(self, output: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, h, w) each -> the reconstruction's loss (), and its terms."""
        terms = {"l1": (output - images).abs().mean(), "l2": (output - images).square().mean()}
        loss = terms["l1"] + self.l2_weight * terms["l2"]
        if self.perceptual is not None:
            count = math.ceil(len(images) * self.perceptual_share) if self.training else len(images)
            terms["perceptual"] = self.perceptual(output[:count], images[:count])
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.log_variance is not None:
            terms["log_variance"] = self.log_variance
            loss = loss / self.log_variance.exp() + self.log_variance
        return loss, terms

    def forget(self) -> None:
        """The discriminator's gradients, and what a codebook has seen."""
        if self.adversary is not None:
            self.adversary.optimizer.zero_grad()
        if isinstance(self.autoencoder, Quantised):
            self.autoencoder.forget()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Beside the autoencoder's update, those of the discriminator and of a codebook that follows its vectors."""
        if self.adversary is not None:
            self.adversary.step(self.trainer, self.spoilt)
        if isinstance(self.autoencoder, Quantised):
            with unless(self.spoilt, self.autoencoder.moving()):
                self.autoencoder.update(self.trainer.global_step, reduce_sum, self.trainer.global_rank, self.trainer.world_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The discriminator's optimizer goes with the weights."""
        super().on_save_checkpoint(checkpoint)
        if self.adversary is not None:
            checkpoint["adversary"] = self.adversary.optimizer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the discriminator's optimizer until the weights are on their device."""
        super().on_load_checkpoint(checkpoint)
        self.resumed = checkpoint.get("adversary")

    def on_train_start(self) -> None:
        """The discriminator's optimizer goes on where it stopped."""
        if self.adversary is not None and self.resumed is not None:
            self.adversary.optimizer.load_state_dict(self.resumed)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Batch, i: int) -> None:
        """Tries the discriminator on a picture at once, though it may enter much later."""
        if i == 0 and self.adversary is not None:
            self.adversary.network(batch["image"][:1])

    @torch.no_grad()
    def finish(self, data: DataModule) -> None:
        """Measures mean and standard deviation of sampled latents over the training set, over all ranks: per channel, or per
        channel and place where the autoencoder's `mean` is (C, H, W).

        Exact over the sampling noise: E[z] = E[mean], Var[z] = E[mean^2 + std^2] - E[mean]^2. Sums are float64.

        Raises:
            Refusal: a channel is the same everywhere, or not finite; names it.
        """
        rank, world = self.trainer.global_rank, self.trainer.world_size
        each = self.autoencoder.mean.shape
        over = (1, 3, 4) if len(each) == 1 else (1,)
        sums = torch.zeros(3, *each, dtype=torch.float64, device=self.device)
        pictures = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in data.ordered("train", batch=64, rank=rank, world=world):
            batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, self.device, 0), 0)
            moments = self.autoencoder.posterior(batch["image"])
            mean, std = moments.mean.double(), moments.std.double()
            sums += torch.stack((torch.ones_like(mean), mean, mean.square() + std.square())).sum(over)
            pictures += len(mean)
        count, total, square = reduce_sum(sums)
        mean = total / count
        std = (square / count - mean.square()).clamp(min=0).sqrt()
        check_whitens(mean, std)
        self.autoencoder.mean.copy_(mean)
        self.autoencoder.std.copy_(std)
        self.autoencoder.count.copy_(reduce_sum(pictures))
        self.measured = {"fingerprint": data.train_set.index.fingerprint(), "size": data.size}

    def export(self, folder: Path) -> None:
        """Writes model.safetensors, the statistics with it, config.json, and statistics.json: what they are and of what data."""
        per_channel = {"mean": self.autoencoder.mean, "std": self.autoencoder.std}
        numbers = {
            name: value.flatten(1).mean(1).tolist() if value.ndim > 1 else value.tolist() for name, value in per_channel.items()
        }
        numbers["count"] = self.autoencoder.count.item()
        write_json({**numbers, **self.measured}, folder / "statistics.json")
        save_model(self.autoencoder.state_dict(), self.recipe, folder)


def check_whitens(mean: Tensor, std: Tensor) -> None:
    """Raises ValueError where statistics, (C) or (C, H, W) each in float64, cannot whiten: no deviation but rounding."""
    bad = [tuple(place) for place in (~(std > 1e-6 * mean.abs()) | ~std.isfinite()).nonzero().tolist()]
    if not bad:
        return
    whole = mean.ndim == 1
    few = bad if whole else bad[:3]
    found = "; ".join(f"channel {', '.join(map(str, i))} has mean {mean[i]:.4g} and deviation {std[i]:.4g}" for i in few)
    mend = (
        f"autoencoder.channels={max(len(mean) - len(bad), 1)}" if whole else "pictures that differ there (channel, row, column)"
    )
    raise Refusal(
        f"Latents that say nothing cannot be whitened: over the training set, {found}. Train with {mend}, or from another seed."
    )


@torch.no_grad()
def fidelity(output: Tensor, images: Tensor) -> dict[str, Tensor]:
    """(B, 3, h, w) each in [-1, 1] -> means over pictures: `psnr` in dB; `ssim` (https://doi.org/10.1109/TIP.2003.819861)."""
    error = (output - images).square().mean((1, 2, 3))
    terms = {"psnr": (10 * torch.log10(4 / error.clamp(min=1e-10))).mean()}
    if min(images.shape[2:]) > 11:  # its window
        terms["ssim"] = structural_similarity_index_measure(output.float(), images.float(), data_range=2.0)
    return terms
