"""Checkpoints that are whole or not there, and the search for the newest good one."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn

from ldm.folder import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, flushes, renames. Loads tensors and plain containers only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises OSError where nothing could be written; the checkpoints before it still stand."""

        def write(temporary: Path) -> None:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:
                raise OSError(None, str(error).splitlines()[0]) from error

        write_whole(Path(path), write)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint, never running code from it."""
        return read_checkpoint(Path(path), map_location or "cpu")


def checkpoint_callback(folder: str, every: int, keep: int = 2) -> pl.callbacks.ModelCheckpoint:
    """Every `every` optimizer steps and at the end, `folder`/step=N.ckpt; the newest `keep` stay."""
    if keep < 2:
        raise ValueError(f"callback.checkpoint.keep={keep}: keep at least 2, so that a damaged file is not the only one.")
    return pl.callbacks.ModelCheckpoint(
        dirpath=folder,
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=keep,
        every_n_train_steps=every,
        save_on_train_epoch_end=False,
    )


def read_checkpoint(path: Path, device: Any = "cpu") -> dict[str, Any]:
    """Reads tensors and plain containers.

    Raises:
        ValueError: the file is damaged, or holds code.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no whole checkpoint of this framework ({reason}). Take another with resume=PATH.") from error
    if "state_dict" not in checkpoint or "global_step" not in checkpoint:
        raise ValueError(f"{path} is no training checkpoint: it holds {sorted(checkpoint)[:5]}, not state_dict and global_step.")
    return checkpoint


def newest(folder: Path) -> Path | None:
    """The newest good checkpoint below a folder, or None; a damaged one is named and passed over."""
    for path in sorted(folder.rglob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path)
            return path
        except ValueError as error:
            rank_zero_warn(f"{error} The one before it is taken instead.")
    return None


def resume_from(resume: str, folder: Path) -> Path | None:
    """What `resume` means: auto (the newest good checkpoint, or a fresh start), never, or a path.

    Raises:
        FileNotFoundError: a path that is not there.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest(folder)
    if not Path(resume).exists():
        raise FileNotFoundError(f"resume={resume}: there is no such file. Use auto, never, or a path to a .ckpt file.")
    return newest(Path(resume)) if Path(resume).is_dir() else Path(resume)
