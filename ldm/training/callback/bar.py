"""What a person sees of a training: what it is, and how far it has come; a bar on a terminal, a line at times in a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.training.base import Stage
from ldm.training.feed import data_of

LINES = 4  # in a log file, over the whole training
SLOW = 600.0  # seconds after which a log file gets another line


class Bar(pl.Callback):
    """Prints the run's summary as it begins, then its loss, images a second and the time that is left, on rank 0.

    On a terminal a bar, renewed every `refresh_rate` steps; elsewhere a line at each quarter, and every ten minutes.
    """

    def __init__(self, refresh_rate: int = 10, summary: bool = True) -> None:
        self.refresh_rate, self.summary = refresh_rate, summary
        self.bar: tqdm | None = None
        self.first, self.step, self.told = 0, -1, ""
        self.begun, self.away, self.left, self.said = 0.0, 0.0, 0.0, 0.0  # seconds

    def on_train_start(self, trainer: pl.Trainer, module: Stage) -> None:
        """Says what is trained, on what, and where it is written."""
        self.first = self.step = trainer.global_step
        self.away, self.told = 0.0, ""
        self.begun = self.said = time.perf_counter()
        if not trainer.is_global_zero:
            return
        if self.summary:
            print("\n".join(summary(trainer, module)), flush=True)
        if sys.stderr.isatty():
            self.bar = tqdm(total=trainer.max_steps, initial=self.first, desc="training", unit="step", dynamic_ncols=True)
            self.bar.bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"

    def on_train_batch_end(self, trainer: pl.Trainer, module: Stage, outputs: Any, *_: Any) -> None:
        """Renews the bar, or prints a line, when it is time."""
        step = trainer.global_step
        if not trainer.is_global_zero or step == self.step:
            return
        self.step = step
        if self.bar is not None:
            if step % self.refresh_rate == 0 or step == trainer.max_steps:
                self.bar.set_postfix_str(self._state(trainer, module, outputs), refresh=False)
                self.bar.n = step
                self.bar.refresh()
            return
        quarter = step * LINES // trainer.max_steps > (step - 1) * LINES // trainer.max_steps
        if quarter or time.perf_counter() - self.said > SLOW:
            self.said = time.perf_counter()
            print(f"step {step:,} of {trainer.max_steps:,}, {self._state(trainer, module, outputs)}", flush=True)

    def on_validation_start(self, *_: Any) -> None:
        """The time of validation does not count."""
        self.left = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: Stage) -> None:
        """Keeps the validation loss to be shown."""
        self.away += time.perf_counter() - self.left
        loss = trainer.callback_metrics.get("val/loss")
        self.told = "" if loss is None else f", val/loss {float(loss):.4g}"

    def on_train_end(self, *_: Any) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Closes the bar."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _state(self, trainer: pl.Trainer, module: Stage, outputs: Any) -> str:
        """Loss of this step, validation loss, images a second so far, and the time that is left at this pace."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        share = trainer.accumulate_grad_batches if module.automatic_optimization else 1  # Lightning divides the loss by it
        said = f"loss {float(loss) * share:.4g}{self.told}, " if isinstance(loss, Tensor) else ""
        seconds = max(time.perf_counter() - self.begun - self.away, 1e-9)
        done = trainer.global_step - self.first
        left = timedelta(seconds=round((trainer.max_steps - trainer.global_step) * seconds / done))
        return f"{said}{done * module.batch / seconds:,.4g} images/s, {left} left"


def summary(trainer: pl.Trainer, module: Stage) -> list[str]:
    """What is trained, on what, how large it is, and where it is written: a few lines."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    model, data = module.latent_model(), data_of(trainer)
    conditions = "" if model is None else f"told {', '.join(model.conditioner.embedders) or 'nothing'}"
    parts = () if model is None else (model.denoiser.backbone, model.autoencoder)
    network = f"{' on '.join(type(part).__name__ for part in parts)}, {conditions}; " if parts else ""
    size = f" at {data.size} px"
    opened = {split: vars(data).get(f"{split}_set") for split in ("train", "val")}  # to open one would index it
    counts = ", ".join(f"{len(samples):,} {split}" for split, samples in opened.items() if samples is not None)
    counts = f"{counts} samples" if counts else "samples as they come"
    passes = 0 if opened["train"] is None else trainer.max_steps * module.batch / len(opened["train"])
    epochs = f", {passes:.3g} epochs" if passes else ""
    often = trainer.val_check_interval
    often = often // trainer.accumulate_grad_batches if isinstance(often, int) else often
    validation = "no validation" if opened["val"] is None else f"validation every {often:,}"
    start = f", from {trainer.global_step:,}" if trainer.global_step else ""
    processes = f"{trainer.world_size} processes" if trainer.world_size > 1 else f"1 process, {torch.get_num_threads()} threads"
    loggers = ", ".join(type(logger).__name__.removesuffix("Logger") for logger in trainer.loggers) or "no logger"
    return [
        f"stage      {type(module).__name__}: {network}{_short(trained)} parameters are trained, {_short(frozen)} frozen",
        f"data       {type(data).__name__}: {counts}{size}, {module.batch} a step",
        f"length     {trainer.max_steps:,} steps{start}{epochs}; {validation}",
        f"device     {trainer.strategy.root_device}, {processes}, precision {trainer.precision}",
        f"written    {trainer.default_root_dir} ({loggers})",
    ]


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
