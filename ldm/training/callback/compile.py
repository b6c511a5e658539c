"""Networks compiled in place before training: the same weights under the same names, in less time on a GPU."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ldm.errors import Refusal

VARIANTS = 8  # of one block, as many as torch keeps of one function: training and validation, sizes of batches
GRAPHS = ("reduce-overhead", "max-autotune")  # modes of CUDA graphs; none adds gradients up (pytorch/pytorch issue 169545)


class Compile(pl.Callback):
    """Compiles the named parts of a stage, its own choice by default.

    A list of blocks is compiled block by block, which compiles equal ones once. So is every list within a part where `regional`
    is set: minutes become seconds for deep networks, and what lies between the blocks is not fused. `mode` is torch.compile's:
    "reduce-overhead" replays CUDA graphs, which pays for small batches; "max-autotune" searches for kernels.

    An autoencoder's last layer must stay outside: an adaptive adversarial weight takes its gradient alone, and a compiled part
    only gives all gradients at once.
    """

    def __init__(
        self, parts: Sequence[str] | None = None, regional: bool = False, mode: str | None = None, backend: str = "inductor"
    ) -> None:
        self.parts, self.regional = parts, regional
        self.settings = {"backend": backend, "mode": mode, "dynamic": False}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raises ValueError where there is no such part, or gradients would add up in memory that CUDA graphs use again."""
        if self.settings["mode"] in GRAPHS and trainer.accumulate_grad_batches > 1:
            raise Refusal(
                f"callback.compile.mode={self.settings['mode']} replays CUDA graphs, each into the memory of the one before, and "
                f"so into the gradients of trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} micro-batches: use "
                "trainer.accumulate_grad_batches=1, or callback.compile.mode=null (or max-autotune-no-cudagraphs)."
            )
        for name in module.compiled if self.parts is None else self.parts:
            try:
                part = module.get_submodule(name)
            except AttributeError as error:
                raise Refusal(f"callback.compile.parts: {type(module).__name__} has no part {name} ({error}).") from error
            blocks = blocks_of(part) if self.regional or isinstance(part, nn.ModuleList) else [part]
            keep_variants(len(blocks))
            for block in blocks:
                block.compile(**self.settings)

    def on_train_batch_start(self, *_: Any) -> None:
        """A new step may overwrite what the last one's graphs gave."""
        torch.compiler.cudagraph_mark_step_begin()


def keep_variants(blocks: int) -> None:
    """Lets torch keep what it compiles for so many blocks: blocks of one class are one function to it, of which it compiles
    8 variants, and runs all others as if they were not compiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS * blocks)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """A backbone's `blocks`; else the members of a list, or of the lists that a network holds; the network where it has none."""
    if isinstance(blocks := getattr(part, "blocks", None), list | tuple | nn.ModuleList):
        return list(blocks)
    lists = [part] if isinstance(part, nn.ModuleList) else [m for m in part.children() if isinstance(m, nn.ModuleList)]
    return [block for each in lists for block in each] or [part]
