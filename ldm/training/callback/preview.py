"""Pictures from time to time: to disk, and to the loggers that show pictures."""

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from ldm.drawing.generate import generate
from ldm.training.callback.ema import averaged
from ldm.training.feed import data_of
from ldm.types import Guidance, Sampler


class Preview(pl.Callback):
    """Every `every` optimizer steps, on rank 0 and with averaged weights, `draw` of the subclass -> FOLDER/step.png."""

    def __init__(self, folder: str, every: int, count: int = 16) -> None:
        self.folder, self.every, self.count, self.step = Path(folder), every, count, -1

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """-> pictures (N, 3, h, w) in [-1, 1], in rows of 8."""
        raise NotImplementedError

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        """Draws when a multiple of `every` steps is done."""
        step = trainer.global_step
        sharded = module.device_mesh is not None  # then all ranks must draw, since each holds a part of the weights
        if step == self.step or step % self.every or not (trainer.is_global_zero or sharded):
            return
        self.step = step
        training = module.training
        with torch.no_grad(), averaged(trainer, module):
            pictures = self.draw(trainer, module.eval()).float().cpu()
        module.train(training)
        if not trainer.is_global_zero:
            return
        grid = make_grid(pictures.add(1).div(2).clamp(0, 1), nrow=8, padding=1, pad_value=1.0)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, self.folder / f"{step:08d}.png")
        name = type(self).__name__.lower()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, grid, step)
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [grid], step=step)


class Drawings(Preview):
    """Drawn pictures, of the same seeds every time.

    Args:
        folder: where the pictures go, FOLDER/<step>.png.
        every: optimizer steps between two.
        sampler, guidance: how they are drawn.
        size: pixels of a side.
        count: pictures, where `captions` are none.
        captions: what they are drawn for; empty: the conditions of the first validation samples.
    """

    def __init__(
        self,
        folder: str,
        every: int,
        sampler: Sampler,
        guidance: Guidance,
        size: int,
        count: int = 16,
        captions: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, every, len(captions) or count)
        self.sampler, self.guidance, self.size, self.captions = sampler, guidance, size, list(captions)

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """-> (count, 3, h, w)."""
        ask = {"caption": self.captions} if self.captions else first(trainer, module, self.count)
        size = (self.size, self.size)
        return generate(module.model, ask, self.sampler, self.guidance, range(len(next(iter(ask.values())))), size)


class Reconstructions(Preview):
    """Validation pictures: a row of originals, below it their reconstructions, below them what these add (grey: nothing)."""

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """-> (N, 3, h, w), N = 3 * count, filled up with white to rows of 8."""
        images = first(trainer, module, self.count)["image"]
        output = module.autoencoder.decode(module.autoencoder.encode(images).mean).clamp(-1, 1)
        white = images.new_ones(-len(images) % 8, *images.shape[1:])
        columns = (torch.cat((part, white)).split(8) for part in (images, output, (output - images) / 2))
        return torch.cat([row for rows in zip(*columns) for row in rows])


def first(trainer: pl.Trainer, module: pl.LightningModule, count: int) -> dict:
    """The first `count` validation samples, or of training where there are none, on the module's device."""
    data = data_of(trainer)
    batch = next(iter(data.ordered("val" if data.val_set else "train", batch=count)))
    return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, module.device, 0), 0)
