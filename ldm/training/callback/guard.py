"""Updates that would spoil the weights are left out: decided on the device, from gradients that all ranks share."""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldm.errors import Refusal
from ldm.files.lightning import scaler_of
from ldm.training.callback.preempt import Preempted
from ldm.types import Batch

LAG = 2  # steps after which the host looks at what the device decided, so as not to wait for it
WARM = 100  # updates before a spike is told from a beginning


class Guard(pl.Callback):
    """Skips an update whose gradient is not finite, or `spike` times as long as usual, on all ranks alike.

    Each is counted (`train/skipped`) and its samples are named in `folder`/skipped-RANK.jsonl, with those that hold NaN or
    infinity themselves. `patience` in a row stop the training. The usual length is a running mean over some 100 updates. A
    fused optimizer is told on the device; for any other (Muon) the host has to wait for the verdict. With
    trainer.precision=16-mixed the gradient scaler does all this in its own way.
    """

    def __init__(self, folder: str, patience: int = 10, spike: float | None = None) -> None:
        self.folder, self.patience, self.spike = Path(folder), patience, spike
        self.skipped, self.row, self.updates = 0, 0, 0
        self.usual: Tensor | None = None
        self.batches: list[Batch] = []  # of the step under way
        self.window: deque[tuple[int, Tensor, Tensor, Any, list[Batch]]] = deque()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, _: int) -> None:
        """Keeps what the step is made of."""
        self.batches.append(batch)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Decides, and looks at what was decided some steps ago.

        Raises:
            Refusal: `patience` updates in a row were skipped.
        """
        batches, self.batches = self.batches, []
        if scaler_of(trainer) is not None:
            return
        norm = module.norm = gradient_norm(optimizer)
        if module.is_logged():
            module.log("train/gradient_norm", norm)
        module.spoilt = self._judge(norm)
        skip_where(optimizer, module.spoilt)
        self.window.append((trainer.global_step, *_to_host(module.spoilt, norm), batches))
        if len(self.window) > LAG or self.patience == 1:
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Looks at the last steps."""
        while self.window:
            self._look(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """A run that is told to stop has last steps too."""
        if isinstance(exception, Preempted | KeyboardInterrupt):
            self.patience = math.inf  # it ends already
            self.on_train_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers of tensors, with what was decided and not yet looked at."""
        pending = sum(_has_come(spoilt, copied) for _, spoilt, _, copied, _ in self.window)
        return {"skipped": self.skipped + pending, "updates": self.updates, "usual": self.usual}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.skipped, self.updates, self.usual = (state_dict[name] for name in ("skipped", "updates", "usual"))

    def _judge(self, norm: Tensor) -> Tensor:
        """norm: () -> () bool, whether the update is left out."""
        spoilt = ~norm.isfinite()
        if self.spike is None:
            return spoilt
        self.updates += 1
        usual = norm if self.usual is None else self.usual.to(norm)
        if self.updates > WARM:
            spoilt = spoilt | (norm > self.spike * usual)
        moved = torch.where(usual.isfinite(), usual.lerp(norm, 0.01), norm)
        self.usual = torch.where(spoilt, usual, moved)
        return spoilt

    def _look(self, trainer: pl.Trainer) -> None:
        step, spoilt, norm, copied, batches = self.window.popleft()
        if not _has_come(spoilt, copied):
            self.row = 0
            return
        self.row, self.skipped, length = self.row + 1, self.skipped + 1, float(norm.numpy()[()])
        file = self.folder / f"skipped-{trainer.global_rank}.jsonl"
        bad = _write(file, step, length, batches)
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped": self.skipped}, step=step)
        what = f"is {length:.3g}, beyond always.guard.spike" if math.isfinite(length) else "is not finite"
        advice = f"Samples that hold NaN or infinity: {bad[:5]}; leave them out of the shards (data.train)." if bad else ""
        rank_zero_warn(f"The gradient of step {step} {what}: its update is skipped, its samples are named in {file}. {advice}")
        if self.row >= self.patience:
            raise Refusal(
                f"At step {step} the gradient {what}, {self.row} times in a row (always.guard.patience); none was made. "
                + (advice or f"Lower optimizer.lr, or train with trainer.precision=32-true; {file} names the samples.")
            )


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """-> (), the length of all gradients together, on the device, the same on all ranks."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=None)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def skip_where(optimizer: Optimizer, spoilt: Tensor) -> None:
    """Makes the optimizer's next step do nothing where `spoilt`: () bool."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = spoilt.float()  # what torch.amp.GradScaler says it by
    elif spoilt:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


@contextmanager
def unless(spoilt: Tensor | None, tensors: Iterable[Tensor]) -> Iterator[None]:
    """What becomes of the tensors within is undone where `spoilt`: () bool, or None for never."""
    before = [] if spoilt is None else [(tensor, tensor.clone()) for tensor in tensors]
    yield
    for tensor, old in before:
        tensor.copy_(torch.where(spoilt, old, tensor))


def _to_host(spoilt: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Any]:
    """-> both on the host, and what tells when they have come, None if they are there."""
    if spoilt.device.type != "cuda":
        return spoilt.cpu(), norm.cpu(), None
    event = torch.cuda.Event()
    there = [torch.empty((), dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in (spoilt, norm)]
    event.record()
    return *there, event


def _has_come(spoilt: Tensor, copied: Any) -> bool:
    """The verdict that `_to_host` sent on its way."""
    if copied is not None:
        copied.synchronize()
    return bool(spoilt.numpy()[()])  # not .item(), which a device would have to answer


def _write(file: Path, step: int, norm: float, batches: list[Batch]) -> list[str]:
    """Adds a line that names a step's samples; -> the keys of those that are not finite."""
    keys = [key for batch in batches for key in batch.get("key", map(str, batch["position"].tolist()))]
    bad = [False] * len(keys)
    for field in {name for name, value in batches[0].items() if isinstance(value, Tensor) and value.is_floating_point()}:
        finite = torch.cat([batch[field].isfinite().flatten(1).all(1) for batch in batches])
        bad = [one or not good for one, good in zip(bad, finite.tolist())]
    positions = [n for batch in batches for n in batch["position"].tolist()]
    worst = [key for key, one in zip(keys, bad) if one]
    line = {"step": step, "gradient_norm": repr(norm), "not_finite": worst, "keys": keys, "positions": positions}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    return worst
