"""What a run will take, said before it is begun: parameters, FLOPs, memory, time."""

import re
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ldm.errors import Refusal
from ldm.training.base import Stage
from ldm.training.callback.bfloat16 import Bfloat16
from ldm.training.callback.frozen import Frozen, layers_of
from ldm.training.callback.recompute import Recompute
from ldm.training.callback.throughput import flops, peak_of
from ldm.training.optimizer.adamw_8bit import BYTES, adamw_8bit
from ldm.training.parallel.sharded import Sharded
from ldm.types import Batch, DataModule, Draw

SHARE = 0.35  # of the peak: what the best public trainings of these networks on H100 and H200 reach (MLPerf Training, 34 to 36 %)
SPARE = 2**30  # bytes of a card that CUDA itself takes, and that lie between tensors
KEPT = {"weight": 4, "average": 4}  # bytes a trained number, in float32, all the time
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # scaled_dot_product_attention's, in their order
GRADIENT, COPY = 4, 2  # bytes of a gradient, which comes as activations go, and of the copy that autocast makes for a step


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
    trained, frozen, still = numbers(stage, trainer)
    work, activations = _reckoned(stage, trainer, batch)
    world, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    micro = stage.batch // (world * accumulate)
    states, others = _states(stage, trainer, trained, micro * activations), still
    lines = [
        f"parameters        {trained / 1e6:,.1f} million trained, {frozen / 1e6:,.1f} million frozen",
        f"batch             {stage.batch} = {world} devices x {accumulate} micro-batches x {micro} samples",
        f"work              {work / 1e9:,.1f} GFLOP a sample, {work * stage.batch / 1e12:,.2f} TFLOP a step, with the way back",
        f"memory            {_gib(states + others + micro * activations)} a device, estimated: {_gib(states)} weights, AdamW, "
        f"average and {'copies in 16 bits' if _in_half(trainer) else 'gradients'}; {_gib(others)} frozen; "
        f"{_gib(micro * activations)} activations",
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


def _reckoned(stage: Stage, trainer: pl.Trainer, batch: Batch) -> tuple[int, int]:
    """batch: of one sample -> FLOPs of training on it, and bytes of its activations in the trainer's precision."""
    work, activations, norms = cost(stage, batch)
    for callback in trainer.callbacks:
        if isinstance(callback, Recompute):
            callback.on_fit_start(trainer, stage)
            whole, (work, activations, _) = activations, cost(stage, batch)
            blocks = sum("forward" in vars(module) for module in stage.modules())
            activations, norms = activations + (whole - activations) // blocks, norms // blocks  # one block's, as it is redone
    if not _in_half(trainer):
        return work, activations
    wide = not any(isinstance(callback, Bfloat16) for callback in trainer.callbacks)  # group norms stay float32
    return work, (activations + wide * norms) // 2


def _in_half(trainer: pl.Trainer) -> bool:
    return trainer.precision.startswith(("bf16", "16"))


def _states(stage: Stage, trainer: pl.Trainer, trained: int, activations: int) -> int:
    """Bytes beside the activations, and beside what is frozen, of so many trained numbers, where a step has most."""
    shares = trainer.world_size if isinstance(trainer.strategy, Sharded) else 1
    gradients, copies = (trained * size // shares for size in (GRADIENT, COPY if _in_half(trainer) else 0))
    there = gradients if trainer.accumulate_grad_batches > 1 else max(gradients - activations, 0)  # as these go, those come
    return trained * (sum(KEPT.values()) + moments(stage.optimizer)) // shares + copies + there


def numbers(stage: Stage, trainer: pl.Trainer) -> tuple[int, int, int]:
    """-> how many numbers are trained, how many are frozen, and the bytes of the latter."""
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    frozen = [p for p in stage.parameters() if not p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in frozen)
    if any(isinstance(callback, Frozen) for callback in trainer.callbacks):
        layers = [stage.latent_model().get_submodule(name) for name in layers_of(stage.latent_model())]
        size -= sum(p.numel() * (p.element_size() - 2) for layer in layers for p in layer.parameters(recurse=False))
    return trained, sum(p.numel() for p in frozen), size


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


def cost(stage: Stage, batch: Batch) -> tuple[int, int, int]:
    """batch: of one sample -> FLOPs of training on it, bytes of activations that the backward pass needs, in float32, and bytes
    of what goes into group norms and comes out.
    """
    device = torch.device("meta")
    try:
        stage.to(device)
        batch = stage.transfer_batch_to_device(batch, device, 0)
        return flops(stage, batch), *_kept(stage, batch)
    except (NotImplementedError, RuntimeError) as error:
        raise Refusal(
            f"plan: {type(stage).__name__} cannot be reckoned without running it ({str(error).splitlines()[0]}). "
            "callback=[...,throughput] tells its speed and FLOPs as it trains."
        ) from error


def _kept(stage: Stage, batch: Batch) -> tuple[int, int]:
    """Bytes of what autograd keeps, each once, weights left out; of a block that is computed again what enters it. And the bytes
    of what group norms take and give.
    """
    norms = 0
    weights = {p.untyped_storage()._cdata for p in stage.parameters()}
    seen: dict[int, UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage
        return tensor

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        for x in inputs:
            if isinstance(x, Tensor):
                keep(x)

    def pass_norm(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal norms
        norms += 2 * output.nbytes if output.requires_grad else 0

    hooks = [module.register_forward_hook(pass_norm) for module in stage.modules() if isinstance(module, nn.GroupNorm)]
    hooks += [module.register_forward_pre_hook(enter) for module in stage.modules() if "forward" in vars(module)]
    with Fused(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = stage.losses(batch, Draw(0, batch["position"], stage.batch))
    for hook in hooks:
        hook.remove()
    stage.forget()
    del loss
    return sum(storage.nbytes() for storage in seen.values()), norms


class Fused(TorchFunctionMode):
    """Attention as a GPU's kernels compute it: queries, keys, values and the output are kept, and not a weight for each pair."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        """As any mode's."""
        keywords = keywords or {}
        whole = function is not scaled_dot_product_attention or not torch.backends.cuda.flash_sdp_enabled()  # as mean flows ask
        if whole or arguments[0].ndim != 4:
            return function(*arguments, **keywords)
        given = {**dict(zip(ATTENTION, arguments)), **keywords}
        options = {name: given[name] for name in ("attn_mask", "is_causal", "scale") if name in given}
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that the meta device knows
        return fused(given["query"], given["key"], given["value"], **options)[0]


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
