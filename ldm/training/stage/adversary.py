"""The discriminator's side of adversarial training, in step with the autoencoder's one optimizer.

Lightning knows only the autoencoder's optimizer, so that a step is one update of the autoencoder on every axis. The
discriminator's weights take no gradient outside `learn`: neither DDP, nor averages, nor the autoencoder's optimizer see them.
"""

from collections.abc import Callable, Iterable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.files.lightning import scaler_of
from ldm.files.process import world
from ldm.training.base import reduce_sum
from ldm.training.protocols import AdversarialLoss
from ldm.training.resume import keep_settings
from ldm.training.stage.beside import step_beside


class Adversary(nn.Module):
    """A discriminator, its optimizer, and how much the autoencoder heeds it.

    Args:
        network: pictures (B, 3, h, w) -> logits of patches.
        loss: what both sides minimise.
        optimizer: makes the discriminator's.
        rate: what its learning rates are multiplied by, at the autoencoder's step.
        start: the autoencoder's step from which on both learn, from the same reconstructions.
        weight: of the generator's loss in the autoencoder's.
        adaptive: whether it is also multiplied by VQGAN's adaptive weight (https://arxiv.org/abs/2012.09841, equation 7).
    """

    def __init__(
        self,
        network: nn.Module,
        loss: AdversarialLoss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        rate: Callable[[int], float],
        start: int,
        weight: float = 0.5,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        self.network, self.loss, self.rate = network.requires_grad_(False), loss, rate
        self.start, self.weight, self.adaptive = start, weight, adaptive
        self.optimizer = optimizer(list(network.parameters()))
        self.optimizer.register_load_state_dict_pre_hook(keep_settings)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def oppose(self, output: Tensor, reconstruction: Tensor, last_layer: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
        """What the autoencoder's loss grows by, and terms to log.

        output: (B, 3, h, w), reconstructed; reconstruction: (), the loss that the adaptive weight balances; last_layer: where.
        """
        generator = self.loss.generator(self.network(output))
        balance = balance_of(reconstruction, generator, last_layer) if self.adaptive else generator.new_ones(())
        return self.weight * balance * generator, {"generator": generator, "balance": balance}

    def learn(self, real: Tensor, fake: Tensor, trainer: pl.Trainer) -> dict[str, Tensor]:
        """Adds the discriminator's gradients of one micro-batch; -> terms to log. real, fake: (B, 3, h, w), the fake detached."""
        self.network.requires_grad_(True)
        verdicts = self.network(torch.cat((real, fake))).chunk(2)
        loss = self.loss.discriminator(*verdicts)
        scaler = scaler_of(trainer)
        share = loss / trainer.accumulate_grad_batches
        (share if scaler is None else scaler.scale(share)).backward()
        self.network.requires_grad_(False)
        return {"discriminator": loss, "real": verdicts[0].mean(), "fake": verdicts[1].mean()}

    def step(self, trainer: pl.Trainer, spoilt: Tensor | None = None) -> None:
        """One update of the discriminator, left out where `spoilt`, () bool, says so of the autoencoder's."""
        step_beside(self.optimizer, self.rates, self.rate, trainer, spoilt)


def balance_of(reconstruction: Tensor, generator: Tensor, last_layer: nn.Parameter) -> Tensor:
    """|d reconstruction| / (|d generator| + 1e-4), at most 1e4: two losses () and the last layer's weight -> ().

    The gradients are those of the global batch, so that any number of ranks finds the same weight.
    """
    losses = (reconstruction, generator)
    gradients = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses])
    gradients = reduce_sum(gradients) / world()
    first, second = gradients.flatten(1).norm(dim=1)
    return (first / (second + 1e-4)).clamp(max=1e4)
