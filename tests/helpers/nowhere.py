"""Training on the meta device, which holds no numbers: whatever asks the device for one fails, or waits, as it would on a GPU."""

import sys
import traceback
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.training import trainer
from ldm.training.callback import guard
from ldm.training.callback.ema import EMA
from ldm.training.callback.guard import Guard
from ldm.training.callback.preempt import Preempt

META = torch.device("meta")


class Host(CPUAccelerator):
    """A host beside a device that is none."""

    def setup_device(self, device):
        pass


class Nowhere(SingleDeviceStrategy):
    """Weights are on the meta device, and stay there."""

    def __init__(self):
        super().__init__(device=META, accelerator=Host())

    def teardown(self):
        pass


class Device(TorchDispatchMode):
    """Counts operations, and lists the lines of ldm that copy from the host to the device and wait until it is done."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        self.operations[str(operation.overloadpacket)] += 1
        if waits(operation, arguments, keywords):
            line = [frame for frame in traceback.extract_stack() if "/ldm/" in frame.filename][-1]
            self.waits[f"{line.filename}:{line.lineno} {line.line}"] += 1
        return operation(*arguments, **keywords)


def waits(operation, arguments, keywords):
    """Whether it is a copy from host to device that the host waits for."""
    if operation is torch.ops.aten._to_copy.default:
        moves = arguments[0].device.type == "cpu" and keywords.get("device") == META
        return moves and not keywords.get("non_blocking")
    if operation is torch.ops.aten.copy_.default:
        return arguments[0].is_meta and not arguments[1].is_meta and not (*arguments, False)[2]
    return False


class OneStep(pl.Callback):
    """Watches from the beginning of one step to that of the next."""

    def __init__(self):
        self.seen = Device()

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 1:
            self.seen.__enter__()
        if trainer.global_step == 2:
            self.seen.__exit__(None, None, None)


def one_step(stage, data, folder, *callbacks, **settings):
    """-> a `Device` that has seen the second step of a training with all that a run has beside it by default.

    Fused optimizers, which know no such device, are let in; the verdict of `guard`, which is read two steps late, is that all
    is well.
    """
    watch = OneStep()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
        patch.setattr(guard, "_to_host", lambda spoilt, norm: (torch.tensor(False), torch.tensor(0.0), None))
        callbacks = [watch, EMA(0.9), Guard(str(folder)), Preempt(str(folder)), *callbacks]
        settings = {"limit_val_batches": 0, "gradient_clip_val": 1.0, "log_every_n_steps": 50, **settings}
        trainer(folder, 3, accelerator="auto", devices="auto", strategy=Nowhere(), callbacks=callbacks, **settings).fit(
            stage, data
        )
    return watch.seen
