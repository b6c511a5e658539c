"""What a run will take, said before it is begun: parameters, FLOPs, memory, time."""

import re
import time
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.training.base import Stage
from ldm.training.callback.frozen import Frozen, layers_of
from ldm.training.callback.recompute import Recompute
from ldm.training.callback.throughput import flops, peak_of
from ldm.training.optimizer.adamw_8bit import BYTES, adamw_8bit
from ldm.training.parallel.sharded import Sharded
from ldm.types import Batch, DataModule, Draw

SHARE = 0.35  # of the peak: what the best public trainings of these networks on H100 and H200 reach (MLPerf Training, 34 to 36 %)
SPARE = 2**30  # bytes of a card that CUDA itself takes, and that lie between tensors
TRAINED = {"weight": 4, "gradient": 4, "average": 4}  # bytes a number, in float32


def plan(stage: Stage, data: DataModule, trainer: pl.Trainer, device: str) -> str:
    """A page about a run of `trainer`, of which no step is made.

    device: such as H200, or `true` for the one that is here; or the memory of a card, such as 12GB: whether the run fits.

    FLOPs and activations are counted over one sample of the data, on no device where the stage's conditions allow it.
    """
    stage.trainer = trainer
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.ordered("train", batch=1)))
    batch = data.on_after_batch_transfer(batch, 0)
    sizes = [(p.requires_grad, p.numel()) for p in stage.parameters()]
    still = sum(p.numel() * p.element_size() for p in stage.parameters() if not p.requires_grad)
    if any(isinstance(callback, Frozen) for callback in trainer.callbacks):
        layers = [stage.latent_model().get_submodule(name) for name in layers_of(stage.latent_model())]
        still -= sum(p.numel() * (p.element_size() - 2) for layer in layers for p in layer.parameters(recurse=False))
    trained, frozen = (sum(n for trains, n in sizes if trains is which) for which in (True, False))
    work, activations = cost(stage, batch)
    for callback in trainer.callbacks:
        if isinstance(callback, Recompute):
            callback.on_fit_start(trainer, stage)
            whole, (work, activations) = activations, cost(stage, batch)
            blocks = sum("forward" in vars(module) for module in stage.modules())
            activations += (whole - activations) // blocks  # one block's, as it is redone
    if trainer.precision.startswith(("bf16", "16")):
        activations //= 2
    world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    micro = stage.batch // (world * accumulate)
    shares = world if isinstance(trainer.strategy, Sharded) else 1
    states, others = trained * (sum(TRAINED.values()) + moments(stage.optimizer)) // shares, still
    lines = [
        f"parameters        {trained / 1e6:,.1f} million trained, {frozen / 1e6:,.1f} million frozen",
        f"batch             {stage.batch} = {world} devices x {accumulate} micro-batches x {micro} samples",
        f"work              {work / 1e9:,.1f} GFLOP a sample, {work * stage.batch / 1e12:,.2f} TFLOP a step, with the way back",
        f"memory            {_gib(states + others + micro * activations)} a device, estimated: {_gib(states)} weights, "
        f"gradients, AdamW and average; {_gib(others)} frozen; {_gib(micro * activations)} activations",
    ]
    if card := re.fullmatch(r"([\d.]+) ?GB", device, re.IGNORECASE):
        return "\n".join([*lines, fits(float(card[1]) * 2**30, states + others, activations, stage.batch // world, micro)])
    name, speed = _speed(device, trainer)
    seconds = work * stage.batch / (world * speed)
    lines += [
        f"expected speed    {stage.batch / seconds:,.1f} samples/s on {world} x {name}, {seconds:.2g} s a step",
        f"expected time     {_words(seconds * trainer.max_steps)} for {trainer.max_steps:,} steps, without validation",
    ]
    return "\n".join(lines)


def moments(optimizer: Any) -> int:
    """How many bytes an optimizer keeps of each weight: two moments, of AdamW in float32."""
    return BYTES if isinstance(optimizer, partial) and optimizer.func is adamw_8bit else 8


def fits(memory: float, fixed: int, each: int, batch: int, micro: int) -> str:
    """Whether a run fits into a card, and else how it would.

    Args:
        memory: of the card, in bytes.
        fixed: bytes of weights and states.
        each: bytes of a sample's activations.
        batch: samples of a device and step.
        micro: samples at a time.
    """
    room = memory - SPARE - fixed
    most, size = int(room // max(each, 1)), f"{memory / 2**30:g} GB, of which {_gib(SPARE)} are left to CUDA"
    if most >= micro:
        return f"fits              into {size}; {most} samples at a time would"
    if most < 1:
        return (
            f"does not fit      into {size}, nor does one sample at a time: callback=[...,recompute], 16 bits (trainer=gpu or "
            "small_gpu), latents and text made ahead (precompute.py), a smaller data.size, or adapters alone (training=finetune)"
        )
    parts = next(n for n in range(-(-batch // most), batch + 1) if batch % n == 0)
    return f"does not fit      into {size}; {batch // parts} samples at a time do: trainer.accumulate_grad_batches={parts}"


def cost(stage: Stage, batch: Batch) -> tuple[int, int]:
    """batch: of one sample -> FLOPs of training on it, and bytes of activations that the backward pass needs, in float32."""
    device = torch.device("meta")
    try:
        stage.to(device)
        batch = stage.transfer_batch_to_device(batch, device, 0)
        return flops(stage, batch), _kept(stage, batch)
    except (NotImplementedError, RuntimeError) as error:
        raise Refusal(
            f"plan: {type(stage).__name__} cannot be reckoned without running it ({str(error).splitlines()[0]}). "
            "callback=[...,throughput] tells its speed and FLOPs as it trains."
        ) from error


def _kept(stage: Stage, batch: Batch) -> int:
    """Bytes of what autograd keeps, each once, weights left out; of a block that is computed again what enters it."""
    weights = {id(p) for p in stage.parameters()}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and tensor._base is None:
            seen[id(tensor)] = tensor
        return tensor

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        for x in inputs:
            if isinstance(x, Tensor):
                whole = x if x._base is None else x._base
                seen[id(whole)] = whole

    hooks = [module.register_forward_pre_hook(enter) for module in stage.modules() if "forward" in vars(module)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = stage.losses(batch, Draw(0, batch["position"], stage.batch))
    for hook in hooks:
        hook.remove()
    stage.forget()
    del loss
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def _speed(device: str, trainer: pl.Trainer) -> tuple[str, float]:
    """-> the device's name and the FLOP/s to expect of it.

    Raises:
        Refusal: a device that is not known.
    """
    if device.lower() != "true":
        peak = peak_of(device)
        if peak is None:
            raise Refusal(f"plan={device}: its peak is not known; take one of H200, H100, A100, ..., or true for this machine.")
        return f"{device} at {SHARE:.0%} of its peak", SHARE * peak
    root = trainer.strategy.root_device
    peak = peak_of(root)
    if peak is not None:
        return f"{torch.cuda.get_device_name(root)} at {SHARE:.0%} of its peak", SHARE * peak
    x = torch.randn(1024, 1024, device=root)
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        float((x @ x)[0, 0])
        runs += 1
    return f"{root} at 60% of its matrix products'", 0.6 * runs * 2 * 1024**3 / (time.perf_counter() - start)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _words(seconds: float) -> str:
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {name}"
    return f"{seconds:,.0f} seconds"
