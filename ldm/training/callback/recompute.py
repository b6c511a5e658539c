"""Activations computed again in the backward pass instead of kept: less memory for a third more work."""

from collections.abc import Sequence
from functools import partial

import pytorch_lightning as pl
from torch.utils.checkpoint import checkpoint

from ldm.training.callback.compile import blocks_of


class Recompute(pl.Callback):
    """Keeps only what enters the blocks of the named parts, the stage's `compiled` ones by default.

    The numbers are the same (activation checkpointing, https://arxiv.org/abs/1604.06174).
    """

    def __init__(self, parts: Sequence[str] | None = None) -> None:
        self.parts = parts

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Wraps each block's forward in place, once."""
        for name in module.compiled if self.parts is None else self.parts:
            for block in blocks_of(module.get_submodule(name)):
                if "forward" not in vars(block):
                    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
