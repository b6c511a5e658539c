"""What each of two processes does, and the callbacks that spoil it on one of them."""

import errno
import signal
import time

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from helpers.autoencoding import train_both
from helpers.blocks import gradients
from helpers.clip import CLIP
from helpers.survive import Send, adamw
from helpers.training import autoencoder_stage, diffusion, exact, small, train_adapters, train_all, trainer
from ldm.guidance.cfg import CFG
from ldm.measure import Estimate
from ldm.sampler.ddim import DDIM
from ldm.training.callback.checkpoint import WholeCheckpointIO, checkpoint_callback
from ldm.training.callback.ema import EMA
from ldm.training.callback.evaluate import Evaluate
from ldm.training.callback.guard import Guard
from ldm.training.callback.preempt import Preempt
from ldm.training.callback.throughput import Throughput
from ldm.training.parallel.sharded import Sharded
from ldm.training.run import fit
from ldm.training.saved import newest

TWO = {"accelerator": "cpu", "devices": 2}


class OnRank(pl.Callback):
    """A callback that is there on one rank only."""

    def __init__(self, rank, callback):
        self.rank, self.callback = rank, callback

    def on_before_optimizer_step(self, trainer, *arguments):
        if trainer.global_rank == self.rank:
            self.callback.on_before_optimizer_step(trainer, *arguments)


class SpoilLoss(pl.Callback):
    """Makes one picture of a step NaN."""

    def __init__(self, step, rank=0):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, module, batch, _):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            batch["image"][0, 0, 0, 0] = float("nan")


class Full(pl.Callback):
    """The disk of one rank is full when a step is saved."""

    def __init__(self, step, rank):
        self.step, self.rank, self.save = step, rank, torch.save

    def on_before_optimizer_step(self, trainer, *_):
        torch.save = self.full if (trainer.global_step + 1, trainer.global_rank) == (self.step, self.rank) else self.save

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")


class Slow(Preempt):
    """Rank 0 takes its time to put the job back into the queue."""

    def _requeue(self, signum, first):
        time.sleep(0.5 * first)
        if first:
            self.path.with_name("queued").touch()


def train(emoji_root, folder, steps, *callbacks, checkpoint=None, **kwargs):
    """Some steps of fused AdamW in float64, in two micro-batches, clipped; -> what a checkpoint in one process would hold."""
    stage, ema, save = diffusion(), EMA(0.9), checkpoint_callback(str(folder / "steps"), every=1)
    stage.optimizer = adamw
    callbacks = [*callbacks, ema, Guard(str(folder)), save]
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, **kwargs}
    made = trainer(folder, steps, callbacks=callbacks, **settings)
    made.fit(*exact(stage, small(emoji_root)), ckpt_path=checkpoint, weights_only=True)
    return made, newest(folder)


def on_each_rank(emoji_root, folder):
    """What each of two processes runs; the last thing is that rank 1 dies."""
    for name, told in three_stages(emoji_root, folder, strategy="ddp", **TWO).items():
        if told:
            torch.save(told, folder / f"{name}.pt")
    mesh = init_device_mesh("cpu", (2,))
    torch.save(gradients(torch.distributed.get_rank(), mesh), folder / f"gradients-{torch.distributed.get_rank()}.pt")
    with CommDebugMode() as comm:
        train(emoji_root, folder / "sharded", 3, strategy=Sharded(), **TWO)
    reduced = sum(n for op, n in comm.comm_counts.items() if "reduce_scatter" in str(op))
    folders = {"strategy": Sharded(folders=True), "plugins": [WholeCheckpointIO(forgive=1)], **TWO}
    _, path = train(emoji_root, folder / "folders", 2, Full(1, rank=1), **folders)
    assert path.name == "step-00000002.ckpt" and not list(path.parent.glob("*1.ckpt")), "the first save failed on both alike"
    train(emoji_root, folder / "folders", 3, checkpoint=path, **folders | {"strategy": Sharded(folders=True)})
    _, path = train(emoji_root, folder / "both", 2, strategy=DDPStrategy(gradient_as_bucket_view=True), **TWO)
    train(emoji_root, folder / "both", 3, checkpoint=path, strategy=Sharded(), **TWO)
    speed = Throughput(peak=1.0)
    train(emoji_root, folder / "spoilt", 3, SpoilLoss(1, rank=1), speed, strategy=Sharded(), **TWO)
    with pytest.raises(ValueError, match="trainer=fsdp shares out the weights of a diffusion model; what Autoencoding"):
        trainer(folder, 1, strategy=Sharded(), enable_checkpointing=False, **TWO).fit(autoencoder_stage(), small(emoji_root))
    exported(emoji_root, folder / "exported")
    brightness = measured(emoji_root, folder / "measured", strategy=Sharded(), **TWO)
    if torch.distributed.get_rank() == 0:
        torch.save({"reduced": reduced, "flops": speed.flops, "brightness": brightness}, folder / "told.pt")
    callbacks = [OnRank(1, Send(signal.SIGUSR1, 2)), Slow(str(folder / "stopped"))]
    with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)):
        fit(diffusion(), small(emoji_root), trainer(folder, 9, callbacks=callbacks, strategy="ddp", **TWO), folder / "stopped")
    assert (folder / "stopped" / "queued").exists(), "no rank goes before the job is back in the queue"
    train(emoji_root, folder / "killed", 9, OnRank(1, Send(signal.SIGKILL, 3)), strategy="ddp", **TWO)


def three_stages(emoji_root, folder, **settings):
    """Some steps of each stage, of autoencoders against an adversary, and of adapters; -> tensors by name, on rank 0."""
    return {
        "all": train_all(emoji_root, folder, CLIP, **settings),
        "both": train_both(emoji_root, folder, **settings),
        "adapters": train_adapters(emoji_root, folder, **settings),
    }


class Brightness:
    """A metric of drawings: their mean."""

    of, against, protocol = "drawing", None, {"extractor": "mean"}

    def look(self, images, batch):
        return {"mean": images.flatten(1).mean(1)}

    def compute(self, rows, reference):
        return {"brightness": Estimate.mean(rows["mean"])}


def measured(emoji_root, folder, **settings):
    """What callback evaluate says of five drawings after two steps, one at a time: on two ranks unlike numbers of batches."""
    told = []
    sampler, guidance = DDIM(2), CFG(2.0)
    metric = {"brightness": Brightness()}
    evaluate = Evaluate(str(folder), 2, metric, small(emoji_root), sampler, guidance, count=5, batch=1)
    measure = evaluate._measure
    evaluate._measure = lambda *call: told.append(measure(*call)) or told[-1]
    run = trainer(folder, 3, callbacks=[EMA(0.9), evaluate], enable_checkpointing=False, **settings)
    run.fit(diffusion(), small(emoji_root))
    return told[0]["brightness"]["value"]


def exported(emoji_root, folder):
    """A whole run of a sharded model, up to the exported one."""
    stage = diffusion()
    fit(stage, small(emoji_root), trainer(folder, 2, callbacks=[EMA(0.9)], strategy=Sharded(), **TWO), folder)
