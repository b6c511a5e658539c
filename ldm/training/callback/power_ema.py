"""Snapshots of power-function averages, of which ldm.training.average makes an average of any length after training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.files.folder import save_tensors
from ldm.training.average import exponent
from ldm.training.callback._averaging import Averaging, trained
from ldm.training.parallel.sharded import placed_as, whole


class PowerEMA(Averaging):
    """Two averages of lengths `stds`, relative to the training so far, kept every `every` steps and at the end, in float16.

    At step n an average moves by 1 - (1 - 1 / n)^(gamma + 1) towards the weights (EDM2, https://arxiv.org/abs/2312.02696,
    appendix C). A snapshot takes 2 bytes a weight and length; some 100 of them serve a whole training.
    """

    def __init__(self, folder: str, every: int, stds: Sequence[float] = (0.05, 0.1)) -> None:
        super().__init__()
        self.folder, self.every, self.stds = Path(folder), every, tuple(stds)
        self.averages: dict[str, dict[str, Tensor]] = {}

    def begin(self, module: pl.LightningModule) -> None:
        """Starts from the weights, or from what a checkpoint brought."""
        for std in self.stds:
            before = self.averages.get(f"{std:.3f}", {})
            self.averages[f"{std:.3f}"] = {
                name: placed_as(before.get(name, weight.detach()), weight).to(weight.device, torch.float32, copy=True)
                for name, weight in trained(module).items()
            }

    def move(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Moves the averages towards the weights, and writes them when it is time."""
        weights = [weight.detach().float() for weight in trained(module).values()]
        for std in self.stds:
            moved = 1 - (1 - 1 / self.updates) ** (exponent(std) + 1)
            torch._foreach_lerp_(list(self.averages[f"{std:.3f}"].values()), weights, moved)
        if self.updates % self.every == 0:
            self.write(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The last snapshot."""
        if self.updates % self.every:
            self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        """FOLDER/step-N-std-S.safetensors, of the model's weights, on rank 0."""
        for std, average in self.averages.items():
            model = {name.removeprefix("model."): v for name, v in average.items() if name.startswith("model.")}
            half = {name: whole(v.half(), trainer.is_global_zero) for name, v in model.items()}
            if trainer.is_global_zero:
                save_tensors(half, self.folder / f"step-{self.updates:08d}-std-{std}.safetensors")

    def state_dict(self) -> dict[str, Any]:
        """Plain containers of tensors."""
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.averages, self.updates = dict(state_dict["averages"]), state_dict["updates"]
