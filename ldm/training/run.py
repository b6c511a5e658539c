"""One run of one stage: train or resume, then measure and export once."""

import logging
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import DoublePrecision, HalfPrecision

from ldm.errors import Refusal, Unreachable
from ldm.files.process import by_first
from ldm.training.base import Stage
from ldm.training.callback.ema import averaged
from ldm.training.callback.preempt import Preempt, Preempted
from ldm.training.feed import feed
from ldm.training.resume import Changes
from ldm.training.saved import newest, read_checkpoint, resume_from
from ldm.types import DataModule


def fit(stage: Stage, data: DataModule, trainer: pl.Trainer, folder: Path, resume: str = "auto") -> bool:
    """Trains a stage up to the trainer's max_steps and leaves the exported model in the folder; -> whether it got there.

    Args:
        stage: what is trained, and exported at the end.
        data: what it is trained on.
        trainer: Lightning's, whose max_steps is the length.
        folder: of the run.
        resume: `auto` for the newest intact checkpoint of the folder, `never`, or a path.

    Raises:
        Refusal: the checkpoint to resume from is damaged or of another model; its run's settings are others, and cannot be;
            the weights would be kept in few bits; or an epoch is counted, which has no end.
        Unreachable: another rank is gone.
    """
    _check_precision(trainer)
    _check_length(trainer)
    quiet()
    checkpoint = resume_from(resume, folder)
    changes = [c for c in trainer.callbacks if isinstance(c, Changes)]
    for each in changes:
        each.compare(checkpoint, trainer.is_global_zero)
    if checkpoint is not None:
        _say(trainer, f"Resuming from {checkpoint}")
    try:
        trainer.fit(stage, feed(data), ckpt_path=None if checkpoint is None else os.fspath(checkpoint), weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        last = newest(folder)
        how = "begins anew: no checkpoint was due yet" if last is None else f"goes on from {last}"
        _say(trainer, f"\nStopped at step {trainer.global_step}. The same command {how}.")
        raise
    except Refusal as error:  # of what the checkpoint holds, by those who load it: the settings are named that differ
        raise Refusal(f"{error}{''.join(each.told() for each in changes)}") from error
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        raise Unreachable(
            f"Rank {trainer.global_rank} lost the others at step {trainer.global_step}; what they print says why. What was saved "
            "stands: the same command goes on."
        ) from error
    except Preempted as stop:
        _say(trainer, f"\n{stop}")
        next(c for c in trainer.callbacks if isinstance(c, Preempt)).requeue(stop.code, trainer.is_global_zero)
        sys.exit(stop.code)
    if trainer.interrupted or trainer.global_step < trainer.max_steps:
        return False
    _finish(stage, data, trainer, folder, checkpoint)
    return True


def quiet() -> None:
    """Leaves out what Lightning says of devices, modules, tips and workers at every start; what it warns of besides stays."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    known = (
        "LeafSpec",
        "overridden `transfer_batch",
        "eval mode at the start",
        "does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "Total length of `list` across ranks is zero",
    )
    warnings.filterwarnings("ignore", message=f".*({'|'.join(known)}).*")


def _finish(stage: Stage, data: DataModule, trainer: pl.Trainer, folder: Path, begun: Path | None) -> None:
    """Keeps the last checkpoint, measures what the model needs and exports it, with the recipe that it was trained by.

    begun: the checkpoint that training went on from.
    """
    if begun is not None and (before := read_checkpoint(begun, lazily=True))["global_step"] == trainer.global_step:
        stage.recipe = {**stage.recipe, **before["recipe"]}
    last = folder / "checkpoints" / f"step-{trainer.global_step:08d}.ckpt"
    if not last.exists():
        trainer.save_checkpoint(last, weights_only=False)
    stage.to(trainer.strategy.root_device).eval()
    with averaged(trainer, stage):
        stage.finish(data)
        by_first(lambda: stage.export(folder))
    _say(trainer, f"The trained model is in {folder}")


def _check_precision(trainer: pl.Trainer) -> None:
    if isinstance(trainer.precision_plugin, HalfPrecision):
        raise Refusal(
            f"trainer.precision={trainer.precision} would keep the weights themselves in 16 bits, too few for small updates to "
            "count. Use trainer.precision=bf16-mixed, and callback=[...,bfloat16] for bfloat16 between all layers too."
        )
    if isinstance(trainer.precision_plugin, DoublePrecision):
        raise Refusal(f"trainer.precision={trainer.precision}: pictures and noise are of 32 bits; wanted 32-true or bf16-mixed.")


def _check_length(trainer: pl.Trainer) -> None:
    """Refuses what counts epochs: the order of training has no end, and what is cut off begins anew with the same samples."""
    counted = {
        "limit_train_batches": trainer.limit_train_batches not in (None, 1.0) or isinstance(trainer.limit_train_batches, int),
        "overfit_batches": bool(trainer.overfit_batches),
        "fast_dev_run": bool(trainer.fast_dev_run),
        "max_epochs": trainer.max_epochs not in (None, -1),
        "min_epochs": bool(trainer.min_epochs),
        "check_val_every_n_epoch": trainer.check_val_every_n_epoch is not None,
        "reload_dataloaders_every_n_epochs": bool(trainer.reload_dataloaders_every_n_epochs),
        "max_steps": trainer.max_steps < 0,
    }
    wrong = [f"trainer.{name}={getattr(trainer, name)}" for name, counts in counted.items() if counts]
    if wrong:
        raise Refusal(
            f"{', '.join(wrong)}: training counts optimizer steps, its samples have an order without end, and an epoch cut short "
            "would take its first samples again, and half a batch where micro-batches are accumulated. Say how long with "
            "trainer.max_steps=N, how often to validate with trainer.val_check_interval=N, on few samples with data.filters."
        )


def _say(trainer: pl.Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, flush=True)
