"""When averages of the weights begin and move, and of which weights they are."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.training.base import Stage


class Averaging(pl.Callback):
    """Averages that move once an optimizer step, not once a micro-batch; `updates` counts the moves."""

    def __init__(self) -> None:
        self.updates, self.step = 0, -1

    def begin(self, module: pl.LightningModule) -> None:
        """Training begins, or goes on from a checkpoint."""

    def move(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The weights have changed, for the `updates`-th time."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begins at the step where training does."""
        self.begin(module)
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Moves, where an optimizer step was made."""
        if trainer.global_step != self.step:
            self.step, self.updates = trainer.global_step, self.updates + 1
            self.move(trainer, module)


def trained(module: pl.LightningModule) -> dict[str, Tensor]:
    """The parameters that are trained and averaged, by name."""
    apart = tuple(f"{part}." for part in module.apart) if isinstance(module, Stage) else ()
    return {name: p for name, p in module.named_parameters() if p.requires_grad and not name.startswith(apart)}
