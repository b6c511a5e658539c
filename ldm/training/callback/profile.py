"""Where the time of a step goes: a trace of some steps, and a table of it."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch.profiler import ProfilerActivity

from ldm.files.folder import write_text


class Profile(pl.Callback):
    """Watches `steps` optimizer steps after `warm` that warm up, on rank 0.

    -> `folder`/trace.json, for https://ui.perfetto.dev or chrome://tracing, and `folder`/table.txt, by own time.
    """

    def __init__(self, folder: str, warm: int = 10, steps: int = 5) -> None:
        self.folder, self.warm, self.steps, self.first, self.at = Path(folder), warm, steps, 0, -1
        self.profiler: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Counts from here."""
        self.first = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Begins after a step, and ends after one."""
        done = trainer.global_step - self.first
        if done == self.at or not trainer.is_global_zero:
            return
        self.at = done
        if done == self.warm:
            device = [ProfilerActivity.CUDA] if module.device.type == "cuda" else []
            self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *device], acc_events=True)
            self.profiler.start()
        elif self.profiler is not None and done == self.warm + self.steps:
            self.write(module.device.type)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A run may end earlier."""
        if self.profiler is not None:
            self.write(module.device.type)
        elif self.at < self.warm and trainer.is_global_zero:
            rank_zero_warn(f"Nothing was profiled: it begins after {self.warm} steps, and there were {self.at}.")

    def write(self, device: str) -> None:
        """Leaves the trace and the table."""
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40, max_name_column_width=60)
        write_text(table + "\n", self.folder / "table.txt")
        print(f"Where the time of {self.steps} steps went is in {self.folder}/table.txt and trace.json", flush=True)
