"""A backbone's forward and backward pass captured as two CUDA graphs: for networks so small that launching them takes longest."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.training.base import Stage
from ldm.training.callback.compile import Compile
from ldm.training.callback.recompute import Recompute
from ldm.types import Cond

SLOTS = ("vector", "tokens", "mask", "spatial")
MOST = 4  # sizes of batches that are captured; others are run as ever


class Graph(pl.Callback):
    """On a GPU, captures the backbone of a diffusion model in the first step, which takes about a second, and replays it.

    Nothing is compiled: the same kernels run, launched at once. It does nothing on a CPU.
    """

    def __init__(self) -> None:
        self.replay: Replay | None = None

    def on_fit_start(self, trainer: pl.Trainer, module: Stage) -> None:
        """Takes the place of the backbone's forward.

        Raises:
            Refusal: no latent model is trained, on several devices, in micro-batches, or beside what changes the same passes.
        """
        model = module.latent_model()
        others = [type(c).__name__.lower() for c in trainer.callbacks if isinstance(c, Compile | Recompute)]
        wrong = {
            "what is trained is no diffusion model": model is None,
            f"there are {trainer.world_size} devices": trainer.world_size > 1,
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}": trainer.accumulate_grad_batches > 1,
            f"callback=[{','.join(others)}] is there too": bool(others),
        }
        if why := [reason for reason, holds in wrong.items() if holds]:
            raise Refusal(
                f"callback=[...,graph] replays the passes of a diffusion model's backbone into the same memory, on one device: "
                f"{'; '.join(why)}. Leave graph out, or callback=[...,compile] callback.compile.mode=reduce-overhead."
            )
        if trainer.strategy.root_device.type == "cuda":
            self.replay = replace_forward(model.denoiser.backbone)

    def on_train_batch_start(self, *_: Any) -> None:
        """A new step may overwrite what the one before put out."""
        if self.replay is not None:
            self.replay.begin()


def replace_forward(network: nn.Module) -> "Replay":
    """Puts a `Replay` in the place of a network's forward; -> it."""
    network.forward = Replay(network)
    return network.forward


class Replay:
    """A backbone's forward: (x, noise_level, cond) -> (B, C, H, W).

    A step's first call with gradients, in training, is replayed: a second one would overwrite what the first one's backward
    pass reads. Every other call is run as ever.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.plain = network, partial(type(network).forward, network)
        self.graphs: dict[Any, Callable[..., Tensor]] = {}
        self.fresh = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replay":
        """-> that of the copied network, which captures anew."""
        return Replay(memo[id(self.network)])

    def begin(self) -> None:
        """From here on memory may be overwritten."""
        self.fresh = True

    def __call__(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C', H, W), noise_level: (B) -> (B, C, H, W)."""
        if not (self.fresh and self.network.training and torch.is_grad_enabled()):
            return self.plain(x, noise_level, cond)
        slots = {slot: value for slot in SLOTS if (value := getattr(cond, slot)) is not None}
        given = tuple(value.to(x.device, non_blocking=True) for value in (x, noise_level, *slots.values()))
        cast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        key = (cast, *slots, *((value.shape, value.dtype, value.requires_grad) for value in given))
        if key not in self.graphs:
            if len(self.graphs) == MOST:
                return self.plain(x, noise_level, cond)
            self.graphs[key] = capture(Flat(self.network, self.plain, tuple(slots)), given, cast)
        self.fresh = False
        return self.graphs[key](*given)


class Flat(nn.Module):
    """A backbone that is given tensors alone: x, the noise level, and the condition's `slots`."""

    def __init__(self, network: nn.Module, plain: Callable[..., Tensor], slots: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.plain, self.slots = network, plain, slots

    def forward(self, x: Tensor, noise_level: Tensor, *conditions: Tensor) -> Tensor:
        """As the backbone."""
        return self.plain(x, noise_level, Cond(**dict(zip(self.slots, conditions))))


def capture(flat: nn.Module, given: tuple[Tensor, ...], cast: torch.dtype | None) -> Callable[..., Tensor]:
    """Tensors as a call is given them -> the network, replayed from its graphs; their memory is the graphs' own.

    Autocast's copies of the weights are made within the graphs, where a cache would outlive them. Other threads, that load data,
    may pin memory meanwhile, where torch lets that be said.
    """
    make = torch.cuda.make_graphed_callables
    apart = {"capture_error_mode": "thread_local"} if "capture_error_mode" in signature(make).parameters else {}
    kind = given[0].device.type
    samples = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in given)
    with torch.autocast(kind, cast, enabled=cast is not None, cache_enabled=False):
        return make(flat, samples, allow_unused_input=True, **apart)
