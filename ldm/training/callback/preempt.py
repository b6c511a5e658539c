"""Stopping in time: a signal, or the end of a job's time, ends training between two steps, saved, on all ranks together.

Lightning's own handlers save in the middle of a step, and look for a signal by a blocking broadcast at every one; these take
their place.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn

from ldm.errors import Refusal
from ldm.files.lightning import listen_with

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
WARNING = signal.SIGUSR1  # what SLURM sends ahead of the time limit, with #SBATCH --signal=USR1@300


class Preempted(Exception):
    """Training stopped as it was told to, and can go on."""

    def __init__(self, signum: int, line: str) -> None:
        super().__init__(line)
        self.code = 128 + signum  # as a shell says it


class Preempt(pl.callbacks.Checkpoint):
    """Stops training at the end of the optimizer step in which SIGTERM, SIGUSR1 or SIGUSR2 reached any rank, and saves.

    So it does `margin` minutes before the time is over: `minutes` from now on, or the end that SLURM tells. What was saved is
    `folder`/preempted.ckpt, the only one of its kind. SIGUSR1 and the end of time put a SLURM job back into its queue, at most
    `restarts` times; a handler that was there before (submitit's) does so in its own way. SIGTERM stops for good.

    Where there are several ranks they agree by gloo, on their processors, while the next step is under way, and stop after it.
    """

    def __init__(self, folder: str, minutes: float | None = None, margin: float = 5.0, restarts: int = 100) -> None:
        self.path, self.restarts = Path(folder) / "preempted.ckpt", restarts
        if minutes is not None and minutes <= margin:
            raise Refusal(
                f"always.preempt.minutes={minutes} is over before training begins: always.preempt.margin={margin} minutes are "
                "kept for saving. Name a longer time, or a shorter margin."
            )
        limits = [time.time() + 60 * minutes] if minutes is not None else []
        limits += [float(os.environ["SLURM_JOB_END_TIME"])] if "SLURM_JOB_END_TIME" in os.environ else []
        self.end = min(limits, default=float("inf")) - 60 * margin
        self.told, self.step, self.process, self.before = 0, -1, os.getpid(), {}
        self.group: Any = None
        self.asked: tuple[torch.Tensor, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Takes the place of Lightning's handlers."""
        listen_with(trainer, self.listen)

    def listen(self) -> None:
        """Sets a flag when a signal comes, and does nothing else."""
        self.before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A group of the ranks that talks by gloo, without the GPUs."""
        self.step = trainer.global_step
        if trainer.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Raises Preempted, once everything is saved."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        signum = self._agreed()
        if not signum or self.step >= trainer.max_steps:
            return
        trainer.save_checkpoint(self.path, weights_only=False)
        name = signal.Signals(signum).name
        raise Preempted(signum, f"Stopped at step {self.step} by {name}. The same command goes on from {self.path.parent}.")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Puts back the handlers that were there."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """The handlers go, unless a second signal would cut short how a preempted run closes its logs."""
        if not isinstance(exception, Preempted):
            self._restore()

    def requeue(self, code: int, first: bool) -> None:
        """Puts the job back into its queue, where there is one; `first` is rank 0.

        The others wait for it: where one ends, srun and torchrun end all.
        """
        try:
            self._requeue(code - 128, first)
        finally:
            if self.group is not None:
                torch.distributed.barrier(self.group)

    def _requeue(self, signum: int, first: bool) -> None:
        before = self.before.get(signum)
        if callable(before) and before is not signal.default_int_handler:
            before(signum, None)
        elif first and signum != signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
            count = int(os.environ.get("SLURM_RESTART_COUNT", 0))
            if count >= self.restarts or shutil.which("scontrol") is None:
                rank_zero_warn(f"The job is not put back into the queue: it was {count} times, or there is no scontrol.")
                return
            array = os.environ.get("SLURM_ARRAY_JOB_ID")
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
            subprocess.run(["scontrol", "requeue", job], check=False)

    def _note(self, signum: int, _: Any) -> None:
        if os.getpid() == self.process:  # a loader's worker, forked from here, is not meant
            self.told = max(self.told, signum)

    def _agreed(self) -> int:
        """-> the signal that any rank had got when the step before this one ended, 0 for none."""
        here = self.told or (WARNING if time.time() > self.end else 0)
        if self.group is None:
            return int(here)
        last, flag = self.asked, torch.tensor([int(here)])
        reduced = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        self.asked = (flag, reduced)
        if last is None:
            return 0
        last[1].wait()
        return int(last[0].numpy()[0])

    def _restore(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}
