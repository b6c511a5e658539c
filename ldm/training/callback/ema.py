"""An exponential average of the weights, kept in float32 beside the model, measured in its place and saved with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.errors import Refusal
from ldm.training.callback._averaging import Averaging, trained
from ldm.training.parallel.sharded import placed_as
from ldm.training.protocols import Average


class EMA(Averaging):
    """Averages what is trained and nothing else, once an optimizer step. Validation and export see the average.

    The decay starts small and grows as (1 + n) / (10 + n) up to `decay`, n counting updates.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.weights: list[Tensor] = []  # to look for them among all at every step takes milliseconds

    def begin(self, module: pl.LightningModule) -> None:
        """Starts from the weights, or from what a checkpoint brought."""
        for name, weight in trained(module).items():
            average = placed_as(self.average.get(name, weight.detach()), weight)
            self.average[name] = average.to(weight.device, torch.float32, copy=True)
        self.weights = list(trained(module).values())

    def move(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Moves the average towards the weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [weight.float() for weight in self.weights]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @property
    def in_place(self) -> bool:
        """Whether the weights are the average now."""
        return bool(self.raw)

    @torch.no_grad()
    def swap_in(self, module: pl.LightningModule) -> None:
        """Puts the average in the weights' place."""
        if self.average and not self.in_place:
            for name, weight in trained(module).items():
                self.raw[name] = weight.detach().clone()
                weight.copy_(self.average[name])

    @torch.no_grad()
    def swap_out(self, module: pl.LightningModule) -> None:
        """Puts the weights back."""
        for name, weight in trained(module).items():
            if name in self.raw:
                weight.copy_(self.raw[name])
        self.raw = {}

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Validation sees the average."""
        self.swap_in(module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Training goes on with the weights."""
        self.swap_out(module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Whatever went wrong, the weights are the weights."""
        self.swap_out(module)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers of tensors."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.average, self.updates = dict(state_dict["average"]), state_dict["updates"]


@contextmanager
def averaged(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Within it, the weights are their average, where the trainer keeps one that is not in place already."""
    emas = [c for c in trainer.callbacks if isinstance(c, Average) and not c.in_place]
    for ema in emas:
        ema.swap_in(module)
    try:
        yield
    finally:
        for ema in emas:
            ema.swap_out(module)


def average_of(trainer: pl.Trainer, module: pl.LightningModule, part: str) -> nn.Module:
    """A frozen copy of a part of the module whose weights are those of the running average, and so move with it.

    What is not trained is shared with the part itself, so that the copy takes no memory.

    Raises:
        Refusal: the trainer keeps no average, or it is shared out over the ranks.
    """
    average = next((c.average for c in trainer.callbacks if isinstance(c, Average)), None)
    if average is None:
        raise Refusal("The objective learns from averaged weights, and none are kept: use callback=[checkpoint,bar,ema].")
    if any(isinstance(weight, DTensor) for weight in average.values()):
        raise Refusal("The objective learns from averaged weights, which trainer=fsdp shares out: use trainer=ddp.")
    original = module.get_submodule(part)
    weights = {id(p): average.get(f"{part}.{name}", p.detach()) for name, p in original.named_parameters()}
    return deepcopy(original, {key: nn.Parameter(x, requires_grad=False) for key, x in weights.items()}).eval()
