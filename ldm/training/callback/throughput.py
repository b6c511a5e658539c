"""How fast a run is: pictures a second, the share of the device's peak, the time spent waiting for data, memory."""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.training.base import Stage
from ldm.types import Batch, Draw

# Dense bfloat16 FLOP/s by what a device's name holds, as its maker says; the first that is found counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
}


class Throughput(pl.Callback):
    """Logs, over each `every` optimizer steps, validation left out:

    speed/images_per_second  over all devices
    speed/mfu                model FLOP/s as a share of the peak of all devices (https://arxiv.org/abs/2204.02311, appendix B),
                             in bfloat16; `peak` in FLOP/s says that of a device that is not known here
    speed/waiting            share of the time between steps: waiting for the next batch, and saving and drawing where it was due
    speed/memory             GiB, the most that this device had allocated

    What recomputing adds (callback `recompute`) is counted as work.
    """

    def __init__(self, every: int = 50, peak: float | None = None) -> None:
        self.every, self.peak, self.flops = every, peak, 0
        self.step, self.first, self.waited, self.away, self.begin, self.end = -1, 0, 0.0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Stage) -> None:
        """Begins to count, and looks up the peak."""
        self.peak = self.peak or peak_of(module.device)
        self._restart(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Stage, batch: Batch, _: int) -> None:
        """A batch has come."""
        self.waited += time.perf_counter() - self.end
        if not self.flops:
            with trainer.precision_plugin.train_step_context():
                self.flops = flops(module, batch)
            self._restart(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Stage, *_: Any) -> None:
        """Logs when it is time."""
        self.end = time.perf_counter()
        done = trainer.global_step - self.first
        if done < self.every:
            return
        seconds = self.end - self.begin - self.away
        images = done * module.batch / seconds
        figures = {"images_per_second": images, "waiting": self.waited / seconds}
        if self.peak:
            figures["mfu"] = images * self.flops / (self.peak * trainer.world_size)
        if module.device.type == "cuda":
            figures["memory"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        for logger in trainer.loggers:
            logger.log_metrics({f"speed/{name}": value for name, value in figures.items()}, step=trainer.global_step)
        self._restart(trainer)

    def on_validation_start(self, *_: Any) -> None:
        """The time of validation does not count."""
        self.left = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        """From here on it does."""
        self.end = time.perf_counter()
        self.away += self.end - self.left

    def _restart(self, trainer: pl.Trainer) -> None:
        self.first, self.waited, self.away = trainer.global_step, 0.0, 0.0
        self.begin = self.end = time.perf_counter()


def flops(stage: Stage, batch: Batch) -> int:
    """FLOPs of training on one picture, forward and backward: 2 for each multiplication of matrices and convolutions.

    Encoding and text are counted where they are not read from the shards. Takes the first sample of `batch`, and leaves no trace
    but, where weights are sharded, that gradients are gone: all ranks call it together, before a step.
    """
    one = {field: value[:1] for field, value in batch.items() if isinstance(value, Tensor | list)}
    weights = [p for p in stage.parameters() if p.requires_grad]
    plain = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)  # of fused attention not all is counted
    with plain[0], plain[1], FlopCounterMode(display=False) as counter, torch.enable_grad():
        loss = stage.losses(one, Draw(0, one["position"], stage.batch))["loss"]
        if any(isinstance(weight, DTensor) for weight in weights):  # their copies, gathered for a layer, are the leaves
            loss.backward()
            stage.zero_grad()
        else:
            torch.autograd.grad(loss, weights, allow_unused=True)
    stage.forget()
    return counter.get_total_flops()


def peak_of(device: torch.device | str) -> float | None:
    """FLOP/s in bfloat16 of a device, or of one of that name; None where it is not known."""
    name = torch.cuda.get_device_name(device) if isinstance(device, torch.device) and device.type == "cuda" else str(device)
    return next((peak for part, peak in PEAKS.items() if part.lower() in name.lower()), None)
