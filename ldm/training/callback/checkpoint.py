"""Checkpoints that are whole or not there, and the search for the newest good one."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn

from ldm.errors import NotFound, NotWritten, Refusal
from ldm.files.folder import LaterFormat, present
from ldm.files.whole import remove_halves, write_whole
from ldm.training.parallel.sharded import FOLDER, check_folder, read_folder, write_folder


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


def read_checkpoint(path: Path, device: Any = "cpu", lazily: bool = False) -> dict[str, Any]:
    """Reads tensors and plain containers; `lazily` leaves the tensors' numbers on the disk until they are used.

    Raises:
        Refusal: the file is damaged, cannot be read, holds code, or is of a later format.
    """
    try:
        if path.is_dir():
            checkpoint = check_folder(path) if lazily else read_folder(path)
        else:
            checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=lazily)
    except Exception as error:  # what damaged bytes may raise has no end: KeyError, IndexError, TypeError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(f"{path} is no whole checkpoint of this framework ({reason}). Take another with resume=PATH.") from error
    if "state_dict" not in checkpoint or "global_step" not in checkpoint:
        raise Refusal(f"{path} is no training checkpoint: it holds {sorted(checkpoint)[:5]}, not state_dict and global_step.")
    return present(checkpoint, path)


def newest(folder: Path) -> Path | None:
    """The newest good checkpoint below a folder, or None; a damaged one is named and passed over.

    Raises:
        LaterFormat: it was written by a later version, which is no damage.
    """
    for path in sorted(folder.rglob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path, lazily=True)
            if path.is_file():
                _check_bits(path)
            return path
        except LaterFormat:
            raise
        except ValueError as error:
            rank_zero_warn(f"{error} The one before it is taken instead.")
    return None


def _check_bits(path: Path) -> None:
    """Reads all of a file and compares the checksums that lie in it; torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip() is not None
    except (zipfile.BadZipFile, NotImplementedError, OSError):  # of its list of contents
        changed = True
    if changed:
        raise Refusal(f"{path} has changed since it was written: its checksums are others.")


def resume_from(resume: str, folder: Path) -> Path | None:
    """What `resume` means: auto (the newest good checkpoint, or a fresh start), never, or a path.

    Raises:
        NotFound: a path that is not there, or a folder without a checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        remove_halves(folder, "*.ckpt")
        return newest(folder)
    if not Path(resume).exists():
        raise NotFound(f"resume={resume}: there is no such file. Use auto, never, or a path to a .ckpt file.")
    found = newest(Path(resume)) if Path(resume).is_dir() else Path(resume)
    if found is None:
        raise NotFound(f"resume={resume}: there is no good checkpoint in this folder. Use auto, never, or a path to a .ckpt.")
    return found
