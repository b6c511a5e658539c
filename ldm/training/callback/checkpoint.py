"""Checkpoints that are whole or not there."""

import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn

from ldm.errors import NotWritten, Refusal
from ldm.files.whole import write_whole
from ldm.training.parallel.sharded import FOLDER, write_folder
from ldm.training.saved import read_checkpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, flushes, renames. Loads tensors and plain containers only.

    `forgive` failures in a row are warned of while training goes on; until a save succeeds again, no older one is removed.
    """

    def __init__(self, forgive: int = 0) -> None:
        self.forgive, self.failed = forgive, 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a file, or, where `storage_options` is FOLDER and all ranks call, a folder.

        Raises:
            OSError: nothing could be written; the checkpoints before it still stand.
        """
        try:
            if storage_options == FOLDER:
                write_folder(checkpoint, Path(path))
            else:
                write_whole(Path(path), lambda temporary: _save(checkpoint, temporary))
        except OSError as error:
            self.failed += 1
            if self.failed > self.forgive:
                raise
            rank_zero_warn(f"{error}. Training goes on; {self.forgive - self.failed} more such failures are forgiven.")
        else:
            self.failed = 0

    def remove_checkpoint(self, path: Any) -> None:
        """Removes an old checkpoint, if the newest was written."""
        if not self.failed and Path(path).exists():
            super().remove_checkpoint(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint, never running code from it."""
        return read_checkpoint(Path(path), map_location or "cpu")


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise NotWritten(f"torch.save failed with {free:,.0f} MiB free: {str(error).splitlines()[0]}") from error


class AtSteps(pl.callbacks.ModelCheckpoint):
    """Saves at the end of optimizer steps only: Lightning's own saves again between the first micro-batches after a resume."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What is resumed is saved already."""
        super().on_train_start(trainer, module)
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Saves when it is time."""
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            super().on_train_batch_end(trainer, *arguments)


def checkpoint_callback(folder: str, every: int, keep: int = 2) -> pl.callbacks.ModelCheckpoint:
    """Every `every` optimizer steps and at the end, `folder`/step=N.ckpt; the newest `keep` stay."""
    if keep < 2:
        raise Refusal(f"callback.checkpoint.keep={keep}: keep at least 2, so that a damaged file is not the only one.")
    return AtSteps(
        dirpath=folder,
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=keep,
        every_n_train_steps=every,
        save_on_train_epoch_end=False,
    )
