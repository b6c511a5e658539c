"""Training on a GPU is training on a CPU: losses, averages, verdicts, signals, checkpoints; nothing waits, nothing grows."""

import json
import signal
from functools import cache, partial

import pytest
import pytorch_lightning as pl
import torch

from helpers.clip import CLIP
from helpers.survive import Send, against
from helpers.training import captioned, contrast, diffusion, exact, small, trainer
from ldm.data.batch.ahead import Ahead
from ldm.training.callback.bfloat16 import Bfloat16
from ldm.training.callback.compile import Compile
from ldm.training.callback.ema import EMA
from ldm.training.callback.graph import Graph
from ldm.training.callback.guard import Guard
from ldm.training.callback.preempt import Preempt
from ldm.training.parallel.sharded import Sharded
from ldm.training.run import fit

STEPS = 4
BF16 = {"precision": "bf16-mixed"}
STAGES = {"diffusion": (diffusion, small), "autoencoding": (against, small), "contrast": (partial(contrast, CLIP), captioned)}
MODES = {
    "float32": (dict, list),
    "bf16": (lambda: BF16, list),
    "bfloat16": (lambda: BF16, lambda: [Bfloat16()]),
    "compiled": (dict, lambda: [compiled()]),
    "compiled bfloat16": (lambda: BF16, lambda: [Bfloat16(), compiled()]),
    "regional": (dict, lambda: [compiled(regional=True)]),
    "graphs": (dict, lambda: [compiled(mode="reduce-overhead")]),
    "replayed": (dict, lambda: [Graph()]),
    "replayed bfloat16": (lambda: BF16, lambda: [Bfloat16(), Graph()]),
}
ALONE = ("compiled bfloat16", "regional", "graphs", "replayed", "replayed bfloat16")  # of diffusion alone
CASES = [(stage, mode) for stage in STAGES for mode in MODES if stage == "diffusion" or mode not in ALONE]


def compiled(**settings):
    """By inductor, whose code for a CPU takes minutes to compile."""
    return Compile(backend="inductor" if torch.cuda.is_available() else "eager", **settings)


def smooth(stage):
    """A fused optimizer under which rounding does not grow."""
    stage.optimizer = partial(torch.optim.AdamW, lr=1e-3, eps=1e-3, fused=True)
    return stage


class Losses(pl.Callback):
    """The loss of each step, left where it is until the end."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.found.append(outputs["loss"].detach().clone())


def losses(name, emoji_root, folder, callbacks=(), double=False, **settings):
    made, data = STAGES[name]
    stage, data, watch, ema = smooth(made()), data(emoji_root), Losses(), EMA(0.9)
    stage, data = exact(stage, data) if double else (stage, data)
    callbacks = [watch, ema, Guard(str(folder)), Preempt(str(folder)), *callbacks]
    run = trainer(folder, STEPS, callbacks=callbacks, gradient_clip_val=1.0, limit_val_batches=0, **settings)
    run.fit(stage, data)
    return torch.stack(watch.found).double().cpu(), {name: x.double().cpu() for name, x in ema.average.items()}


@pytest.fixture(scope="module")
def on_cpu(emoji_root, tmp_path_factory):
    """Losses and averages on the processor, by stage and precision."""

    @cache
    def found(name, precision="32-true", double=False):
        return losses(name, emoji_root, tmp_path_factory.mktemp("cpu"), double=double, precision=precision)

    return found


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_losses_are_the_processors(name, mode, on, on_cpu, emoji_root, tmp_path):
    settings, callbacks = (made() for made in MODES[mode])
    found, average = losses(name, emoji_root, tmp_path, callbacks, **on, **settings)
    if not settings:
        torch.testing.assert_close(found, on_cpu(name)[0], atol=0, rtol=1e-4)
        for weight, x in on_cpu(name)[1].items():
            torch.testing.assert_close(average[weight], x, atol=1e-5, rtol=1e-3)
        return
    whole = on_cpu(name)[0]
    rounding = (on_cpu(name, "bf16-mixed")[0] - whole).abs().max().clamp(min=2**-8 * whole.abs().max())
    assert (found - whole).abs().max() <= 3 * rounding


# ---- copies


def test_a_batch_copied_ahead_is_the_batch(device):
    """While the device is busy, so that a copy too early or too late would show."""
    batches = [{"x": torch.full((1 << 20,), float(n)), "key": [str(n)]} for n in range(8)]
    if device.type == "cpu":
        return
    pinned = [{**batch, "x": batch["x"].pin_memory()} for batch in batches]
    move = lambda batch: {**batch, "x": batch["x"].to(device, non_blocking=True)}  # noqa: E731
    busy, sums = torch.randn(2048, 2048, device=device), []
    for batch in Ahead(pinned, move, device):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        sums.append(batch["x"].min() + batch["x"].max())
        del batch
    assert torch.stack(sums).tolist() == [2.0 * n for n in range(8)]


class Strict(pl.Callback):
    """From some step on whatever the host would wait for is an error."""

    def __init__(self, first, device):
        self.first, self.on = first, device.type == "cuda"

    def on_train_batch_end(self, trainer, *_):
        if self.on and trainer.global_step == self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, *_):
        self.off()

    def on_exception(self, *_):
        self.off()

    def off(self):
        if self.on:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STAGES)
def test_the_host_never_waits(name, device, on, emoji_root, tmp_path):
    losses(name, emoji_root, tmp_path, [Strict(2, device)], **on)


def test_memory_does_not_grow(device, on, emoji_root, tmp_path):
    held = {}

    class Memory(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (20, 220) and device.type == "cuda":
                held[trainer.global_step] = torch.cuda.memory_allocated(device)

    callbacks = [Memory(), EMA(0.9), Guard(str(tmp_path)), Preempt(str(tmp_path))]
    steps = 221 if device.type == "cuda" else 3
    trainer(tmp_path, steps, callbacks=callbacks, limit_val_batches=0, **on).fit(smooth(diffusion()), small(emoji_root))
    assert not held or held[220] <= 1.01 * held[20]


# ---- going on


def legs(emoji_root, folder, steps, callbacks=(), **settings):
    """Trains in legs, as processes one after the other would; -> the last weights and their average."""
    checkpoint = None
    for last in steps:
        stage, ema = smooth(diffusion()), EMA(0.9)
        own = [make() for make in callbacks]
        run = trainer(folder, last, callbacks=[ema, *own], gradient_clip_val=1.0, deterministic="warn", **settings)
        run.fit(stage, small(emoji_root), ckpt_path=checkpoint, weights_only=True)
        checkpoint = folder / f"{last}.ckpt"
        run.save_checkpoint(checkpoint, weights_only=False)
    return {**stage.state_dict(), **{f"average {name}": x for name, x in ema.average.items()}}


@pytest.mark.parametrize("fast", [(), (Graph,), (Bfloat16,)], ids=["plain", "replayed", "bfloat16"])
def test_what_goes_on_is_bitwise_what_was_not_stopped(fast, on, emoji_root, tmp_path):
    settings = {**on, **(BF16 if Bfloat16 in fast else {})}
    whole, parts = (legs(emoji_root, tmp_path, steps, fast, **settings) for steps in ([5], [2, 5]))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_signal_stops_it_and_the_same_command_goes_on(on, emoji_root, tmp_path):
    def run(*callbacks):
        callbacks = [*callbacks, EMA(0.9), Guard(str(tmp_path)), Preempt(str(tmp_path / "checkpoints"))]
        fit(smooth(diffusion()), small(emoji_root), trainer(tmp_path, 4, callbacks=callbacks, **on), tmp_path)

    with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)):
        run(Send(signal.SIGUSR1, 2))
    assert (tmp_path / "checkpoints" / "preempted.ckpt").exists() and not (tmp_path / "model.safetensors").exists()
    run()
    assert (tmp_path / "model.safetensors").exists()


# ---- the guard, and weights that are shared out


class Spoil(pl.Callback):
    """Makes one picture of a step NaN."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, _):
        if trainer.global_step == self.step:
            batch["image"][0, 0, 0, 0] = float("nan")


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_spoilt_update_is_left_out(strategy, on, emoji_root, tmp_path):
    settings = on if strategy == "auto" else {**on, "strategy": Sharded()}
    stage = smooth(diffusion())
    try:
        callbacks = [Spoil(1), EMA(0.9), Guard(str(tmp_path))]
        trainer(tmp_path, 4, callbacks=callbacks, gradient_clip_val=1.0, **settings).fit(stage, small(emoji_root))
    finally:
        alone()
    assert all(x.isfinite().all() for x in map(full, stage.parameters()))
    (line,) = (tmp_path / "skipped-0.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


@pytest.mark.parametrize("folders", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
def test_shared_out_over_one_rank_it_is_the_same(mode, folders, on, on_cpu, emoji_root, tmp_path):
    """FSDP2, by NCCL on a GPU: losses, a checkpoint that goes on, and the export."""
    settings, made = MODES[mode]
    try:
        found, _ = losses("diffusion", emoji_root, tmp_path, made(), strategy=Sharded(folders), **on, **settings())
        for steps in (2, 4):
            stage, data = smooth(diffusion()), small(emoji_root)
            callbacks = [EMA(0.9), Guard(str(tmp_path)), *made()]
            run = trainer(tmp_path, steps, callbacks=callbacks, strategy=Sharded(folders), **on, **settings())
            fit(stage, data, run, tmp_path)
    finally:
        alone()
    torch.testing.assert_close(found, on_cpu("diffusion")[0], atol=0, rtol=1e-4 if mode == "float32" else 3e-2)
    assert (tmp_path / "model.safetensors").exists()


def full(weight):
    """All of it, on the processor."""
    weight = weight.detach()
    return weight.full_tensor().cpu() if hasattr(weight, "full_tensor") else weight.cpu()


def alone():
    """Ends the group of one process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
