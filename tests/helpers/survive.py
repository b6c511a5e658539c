"""A signal at a step, an optimizer and an adversary."""

import os

import pytorch_lightning as pl
import torch

from helpers.training import autoencoder_stage
from ldm.loss.adversary import Hinge, PatchGAN
from ldm.training.optimizer.rate import Constant
from ldm.training.stage.adversary import Adversary


class Send(pl.Callback):
    """Sends this process a signal in the middle of a step, or of validation."""

    def __init__(self, signum, step, validating=False):
        self.signum, self.step, self.validating = signum, step, validating

    def on_before_optimizer_step(self, trainer, *_):
        if not self.validating and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer, *_):
        if self.validating and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def adamw(params, fused=True):
    return torch.optim.AdamW(params, lr=1e-2, fused=fused)


def against():
    stage = autoencoder_stage()
    network = PatchGAN(8, 1, groups=4)
    stage.adversary = Adversary(network, Hinge(), adamw, Constant(), start=0, weight=0.5)
    stage.optimizer = adamw
    return stage
