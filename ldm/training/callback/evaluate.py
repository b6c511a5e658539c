"""Metrics as training goes on: any metric, on averaged weights, on all ranks, beside the training and never in its way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.errors import Refusal
from ldm.evaluation.pictures import Drawings, Reconstructions, Split, chosen
from ldm.evaluation.protocol import code_version, entries, write_numbers
from ldm.evaluation.run import measure
from ldm.files.process import by_first, first
from ldm.files.weights import weights_hash
from ldm.measure import Metric
from ldm.training.base import Stage
from ldm.training.callback.ema import averaged
from ldm.training.parallel.sharded import gathered, whole
from ldm.types import DataModule, Guidance, Sampler


class Evaluate(pl.Callback):
    """Draws and measures as training goes on; the numbers also go to the loggers, as `evaluate/<number>`.

    Args:
        folder: where the numbers go, FOLDER/<step>/metrics.json.
        every: optimizer steps between two measurements.
        metric: what is measured, by name.
        data: a module of its own, so that training takes the same samples as without.
        sampler, guidance: how the pictures are drawn.
        count: pictures that are drawn, for evenly chosen samples.
        requests: the split whose conditions they are drawn for.
        reference: the split of the real pictures.
        batch: pictures at a time, on each rank.
        seed: of the pictures; training takes the same noise as without.
        checkpoints: the folder of the best one.
        best: the number by which the best checkpoint is kept as CHECKPOINTS/best.ckpt; None keeps none.
        mode: whether the best is the `min` or the `max`.
    """

    def __init__(
        self,
        folder: str,
        every: int,
        metric: Mapping[str, Metric],
        data: DataModule,
        sampler: Sampler,
        guidance: Guidance,
        count: int = 128,
        requests: str = "val",
        reference: str = "train",
        batch: int = 32,
        seed: int = 0,
        checkpoints: str = "checkpoints",
        best: str | None = None,
        mode: str = "min",
    ) -> None:
        if mode not in ("min", "max"):
            raise Refusal(f"callback.evaluate.mode={mode}: wanted min or max.")
        self.folder, self.every, self.metric, self.data = Path(folder), every, metric, data
        self.sampler, self.guidance, self.count, self.requests, self.reference = sampler, guidance, count, requests, reference
        self.batch, self.seed, self.checkpoints, self.best, self.mode = batch, seed, Path(checkpoints), best, mode
        self.record: float | None = None
        self.step = -1

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Reads the data, and refuses what could only fail after the first steps."""
        self.data.setup()
        if not self.metric:
            raise Refusal("callback=[evaluate] has nothing to measure; choose metric@callback.evaluate.metric=[clip_score].")
        if any(metric.of == "drawing" for metric in self.metric.values()):
            chosen(self.data, self.count, self.requests)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        """Measures when a multiple of `every` steps is done."""
        step = trainer.global_step
        if step == self.step or step % self.every:
            return
        self.step, training = step, module.training
        with torch.no_grad(), torch.random.fork_rng(), averaged(trainer, module):
            numbers = self._measure(module.eval(), step)
        module.train(training)
        for logger in trainer.loggers:
            logger.log_metrics({f"evaluate/{name}": entry["value"] for name, entry in numbers.items()}, step=step)
        if trainer.is_global_zero:
            write_numbers(numbers, self.folder / f"{step:08d}")
        self._keep_best(trainer, numbers)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run goes on from it."""
        return {"record": self.record, "best": self.best, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, if it is of the same number."""
        if (state_dict.get("best", self.best), state_dict.get("mode", self.mode)) == (self.best, self.mode):
            self.record = state_dict["record"]

    def _measure(self, module: Stage, step: int) -> dict[str, dict[str, Any]]:
        model = module.latent_model()
        autoencoder, device = model.autoencoder if model else module.autoencoder, module.device
        still = [part.removeprefix("model.") for part in module.frozen if part.startswith("model.")]
        weights, used = content(model or autoencoder, still), {}

        def use(kind: str, source: Any) -> Any:
            used[kind] = source
            return source

        def draw() -> Drawings:
            requests = Split(self.data, self.requests, device, chosen(self.data, self.count, self.requests))
            how = {"sampler": repr(self.sampler), "guidance": repr(self.guidance), "model": weights}
            return Drawings(model, requests, self.sampler, self.guidance, self.seed, (self.data.size,) * 2, protocol=how)

        pictures = {
            "drawing": lambda: use("drawing", draw()),
            "reconstruction": lambda: use(
                "reconstruction", Reconstructions(autoencoder, Split(self.data, "val", device), weights)
            ),
        }
        places = {"train": "train", "val": "val", "reference": self.reference}
        real = {k: lambda k=k, split=split: use(k, Split(self.data, split, device)) for k, split in places.items()}
        with gathered(module):  # ranks may draw unlike numbers of pictures
            numbers, corrupt = measure(self.metric, pictures, real, self.folder / "rows", self.folder / "references", self.batch)
        settings = {"ema": True, "code": code_version()}
        return entries(numbers, self.metric, used, settings, {"step": step, "sha256": weights}, corrupt)

    def _keep_best(self, trainer: pl.Trainer, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        if self.best is None:
            return
        if self.best not in numbers:
            raise Refusal(f"callback.evaluate.best={self.best}: there are the numbers {', '.join(numbers)}.")
        value = numbers[self.best]["value"]
        sign = 1 if self.mode == "min" else -1
        if self.record is None or sign * value < sign * self.record:
            self.record = value
            trainer.save_checkpoint(self.checkpoints / "best.ckpt")


def content(module: nn.Module, still: Sequence[str]) -> str:
    """As weights_hash, also of a module whose weights are shared out over the ranks, all of which ask."""
    state = module.state_dict()
    if not any(isinstance(x, DTensor) for x in state.values()):
        return weights_hash(module, still)
    tensors = {name: whole(x, first()) for name, x in state.items()}
    return by_first(lambda: weights_hash(Held(tensors)))


class Held(nn.Module):
    """Tensors by name, which are all its state."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """As they are."""
        return dict(self.tensors)
