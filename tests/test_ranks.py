"""Two processes, started by torchrun: sharded or not they train as one, stop as one, skip as one, and one may die."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLIP
from pytorch_lightning.strategies import DDPStrategy
from test_autoencoding import train_both
from test_survive import Send, adamw
from test_training import assert_same, autoencoder_stage, diffusion, exact, small, train_all, trainer
from torch.distributed.tensor.debug import CommDebugMode

from ldm.compose import CONFIGS
from ldm.training.callback.checkpoint import WholeCheckpointIO, checkpoint_callback, newest, read_checkpoint
from ldm.training.callback.ema import EMA
from ldm.training.callback.guard import Guard
from ldm.training.callback.preempt import Preempt
from ldm.training.callback.throughput import Throughput
from ldm.training.parallel.sharded import Sharded
from ldm.training.run import fit

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


def held(path):
    """Weights, averages and the optimizer's state in a checkpoint, by name."""
    checkpoint = read_checkpoint(path)
    states = {f"{i}/{k}": v for i, s in checkpoint["optimizer_states"][0]["state"].items() for k, v in s.items()}
    average = {f"average/{k}": v for k, v in checkpoint["callbacks"]["EMA"]["average"].items()}
    return checkpoint["state_dict"] | average | states


def on_each_rank(emoji_root, folder):
    """What torchrun runs; the last thing is that rank 1 dies."""
    for name, told in three_stages(emoji_root, folder, strategy="ddp", **TWO).items():
        if told:
            torch.save(told, folder / f"{name}.pt")
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
    if torch.distributed.get_rank() == 0:
        torch.save({"reduced": reduced, "flops": speed.flops}, folder / "told.pt")
    callbacks = [OnRank(1, Send(signal.SIGUSR1, 2)), Slow(str(folder / "stopped"))]
    with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)):
        fit(diffusion(), small(emoji_root), trainer(folder, 9, callbacks=callbacks, strategy="ddp", **TWO), folder / "stopped")
    assert (folder / "stopped" / "queued").exists(), "no rank goes before the job is back in the queue"
    train(emoji_root, folder / "killed", 9, OnRank(1, Send(signal.SIGKILL, 3)), strategy="ddp", **TWO)


def three_stages(emoji_root, folder, **settings):
    """Some steps of each stage, and of autoencoders against an adversary; -> tensors by name, on rank 0."""
    return {
        "all": train_all(emoji_root, folder, CLIP, **settings),
        "both": train_both(emoji_root, folder, **settings),
    }


def exported(emoji_root, folder):
    """A whole run of a sharded model, up to the exported one."""
    stage = diffusion()
    fit(stage, small(emoji_root), trainer(folder, 2, callbacks=[EMA(0.9)], strategy=Sharded(), **TWO), folder)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_ranks import on_each_rank
if __name__ == "__main__":
    on_each_rank({data!r}, Path({folder!r}))
"""


@pytest.fixture(scope="module")
def two(emoji_root, tmp_path_factory):
    """The folder in which two processes did all of it."""
    folder = tmp_path_factory.mktemp("two")
    path = [str(CONFIGS.parent), str(Path(__file__).parent)]
    (folder / "two.py").write_text(SCRIPT.format(path=path, data=str(emoji_root), folder=str(folder)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(folder / "two.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(launch, capture_output=True, text=True, timeout=1800, env=environment)
    assert (folder / "killed").exists(), answer.stderr[-3000:]
    assert answer.returncode != 0, "one rank was killed, and the other did not wait for it for ever"
    return folder


@pytest.fixture(scope="module")
def one(emoji_root, tmp_path_factory):
    """One process on the same global batches, and the same where step 1 is spoilt."""
    folder = tmp_path_factory.mktemp("one")
    speed = Throughput(peak=1.0)
    plain, spoilt = train(emoji_root, folder / "plain", 3)[1], train(emoji_root, folder / "spoilt", 3, SpoilLoss(1), speed)[1]
    return {False: held(plain), True: held(spoilt), "flops": speed.flops} | three_stages(emoji_root, folder)


@pytest.mark.parametrize("name", ["sharded", "folders", "both", "spoilt"])
def test_two_ranks_are_one(name, one, two):
    """Weights, averages and moments; from a file, from a folder read twice, from DDP into shards, past a spoilt step."""
    wanted, found = one[name == "spoilt"], held(newest(two / name))
    assert newest(two / name).is_dir() == (name == "folders")
    assert_same(found, wanted)


@pytest.mark.parametrize("name", ["all", "both"])
def test_two_ranks_train_every_stage_as_one(name, one, two):
    """Contrast, autoencoding, diffusion, statistics; adaptive weight, discriminator, codebook counts and dead codes."""
    assert_same(torch.load(two / f"{name}.pt", weights_only=True), one[name])


def test_a_damaged_folder_is_passed_over(two, tmp_path):
    """One byte in what rank 1 wrote, and a file that is gone; the folder before it is taken, without reading any whole."""
    for step in (1, 2):
        shutil.copytree(newest(two / "folders"), tmp_path / f"step-{step}.ckpt")
        os.utime(tmp_path / f"step-{step}.ckpt", (step, step))
    assert newest(tmp_path).name == "step-2.ckpt"
    part = tmp_path / "step-2.ckpt" / "__1_0.distcp"
    data = part.read_bytes()
    where = data.index(b"/data/0")  # in a tensor's archive, just ahead of its numbers
    part.write_bytes(data[: where + 80] + bytes([data[where + 80] ^ 1]) + data[where + 81 :])
    with pytest.warns(UserWarning, match="__1_0.distcp has changed since it was written"):
        assert newest(tmp_path).name == "step-1.ckpt"
    part.unlink()
    with pytest.warns(UserWarning, match="No such file"):
        assert newest(tmp_path).name == "step-1.ckpt"


def test_gradients_are_reduced_once_a_step(two):
    """Three steps of two micro-batches: as many reductions as there are parts, and steps."""
    backbone = diffusion().model.denoiser.backbone
    parts = 2 + len(backbone.blocks)
    assert torch.load(two / "told.pt")["reduced"] == 3 * parts


def test_a_sharded_step_is_counted_as_the_whole_one(one, two):
    assert torch.load(two / "told.pt")["flops"] == one["flops"] > 0


def test_a_sharded_model_is_exported_whole(two):
    from ldm.files.folder import load_tensors

    weights, own = load_tensors(two / "exported" / "model.safetensors"), diffusion().model.state_dict()
    assert {name: weight.shape for name, weight in weights.items()} == {name: weight.shape for name, weight in own.items()}


def test_a_signal_to_one_rank_stops_both_after_the_next_step(two):
    assert read_checkpoint(newest(two / "stopped"))["global_step"] == 3


def test_a_killed_rank_costs_what_came_after_the_last_checkpoint(two):
    assert read_checkpoint(newest(two / "killed"))["global_step"] == 2
