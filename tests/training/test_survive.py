"""Signals, time limits, spoilt gradients, full and lost storage: what training does about them."""

import errno
import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from helpers.survive import Send, adamw, against
from helpers.training import diffusion, small, trainer
from ldm.data.batch.samples import stay
from ldm.training.callback.checkpoint import WholeCheckpointIO, checkpoint_callback
from ldm.training.callback.ema import EMA
from ldm.training.callback.guard import Guard, skip_where
from ldm.training.callback.preempt import Preempt, Preempted
from ldm.training.run import fit
from ldm.training.saved import newest, read_checkpoint, resume_from


def run(emoji_root, folder, *callbacks, steps=6, every=100, **kwargs):
    """One leg of a run in a folder, as train.py has it; -> the stage and its average."""
    stage, ema = diffusion(), EMA(0.9)
    callbacks = [*callbacks, Preempt(str(folder / "checkpoints")), ema, checkpoint_callback(str(folder / "checkpoints"), every)]
    stage.export = lambda _: None
    fit(stage, small(emoji_root), trainer(folder, steps, callbacks=callbacks, **kwargs), folder)
    return stage.state_dict(), ema.average


@pytest.fixture
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of an array, and a scontrol that writes down what it is asked."""
    said = tmp_path / "said.txt"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "77", "ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return lambda: said.read_text() if said.exists() else ""


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_queues_again(signum, emoji_root, tmp_path, slurm, handlers, capsys):
    with pytest.raises(SystemExit) as stop:
        run(emoji_root, tmp_path / "run", Send(signum, 3), accumulate_grad_batches=2)
    assert stop.value.code == 128 + signum
    assert slurm() == ("requeue 70_3\n" if signum == signal.SIGUSR1 else ""), "SIGTERM is an end: scancel sends it"
    assert f"Stopped at step 3 by {signum.name}. The same command goes on" in capsys.readouterr().out
    assert read_checkpoint(newest(tmp_path / "run"))["global_step"] == 3
    whole, average = run(emoji_root, tmp_path / "whole", accumulate_grad_batches=2)
    weights, other = run(emoji_root, tmp_path / "run", accumulate_grad_batches=2)
    assert all(torch.equal(whole[name], weights[name]) for name in whole)
    assert all(torch.equal(average[name], other[name]) for name in average)
    assert signal.getsignal(signum) not in (signal.SIG_IGN,)


def test_a_signal_in_validation_waits_for_its_end(emoji_root, tmp_path, handlers):
    with pytest.raises(SystemExit):
        run(emoji_root, tmp_path, Send(signal.SIGTERM, 2, validating=True), val_check_interval=2)
    assert read_checkpoint(newest(tmp_path))["global_step"] == 3


def test_a_job_stops_before_its_time_is_over(monkeypatch, handlers, emoji_root, tmp_path):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 3600))
    assert 3200 < Preempt(".").end - time.time() < 3400 and Preempt(".", minutes=1, margin=0).end - time.time() < 61
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 10))
    with pytest.raises(SystemExit) as stop:
        run(emoji_root, tmp_path)
    assert stop.value.code == 128 + signal.SIGUSR1 and read_checkpoint(newest(tmp_path))["global_step"] == 1


def test_a_time_that_is_over_at_once_is_refused():
    with pytest.raises(ValueError, match=r"always\.preempt\.minutes=3 .* always\.preempt\.margin=5"):
        Preempt(".", minutes=3, margin=5)


def test_a_job_is_queued_again_in_the_way_of_who_started_it(slurm, monkeypatch, handlers):
    calls, preempt = [], Preempt(".", restarts=2)
    signal.signal(signal.SIGUSR2, lambda signum, frame: calls.append(signum))
    preempt.listen()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert calls == [] and preempt.told == signal.SIGUSR2, "the handler only sets a flag"
    preempt.requeue(128 + signal.SIGUSR2, True)
    assert calls == [signal.SIGUSR2] and slurm() == ""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.warns(UserWarning, match="it was 2 times"):
        preempt.requeue(128 + signal.SIGUSR1, True)
    preempt.requeue(128 + signal.SIGUSR1, False)
    assert slurm() == ""


def test_lightnings_handlers_are_not_there(emoji_root, tmp_path, handlers):
    """What Preempt replaces by name is still there to be replaced."""
    made = trainer(tmp_path, 1)
    assert callable(made._signal_connector.register_signal_handlers)
    assert callable(made.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert MixedPrecision("16-mixed", "cpu").scaler is not None, "what Guard and Adversary leave to it, they know it by"


LENGTH = {"max_steps": 9, "max_epochs": -1, "min_epochs": None, "limit_train_batches": 1.0, "overfit_batches": 0.0}
LENGTH |= {"fast_dev_run": False, "check_val_every_n_epoch": None, "reload_dataloaders_every_n_epochs": 0}


def test_a_rank_that_is_left_alone_says_so_in_a_line(tmp_path):
    def alone(*_, **__):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1")

    left = SimpleNamespace(**LENGTH, fit=alone, global_rank=1, global_step=7, precision_plugin=None, callbacks=[])
    with pytest.raises(ConnectionError, match="Rank 1 lost the others at step 7"):
        fit(None, SimpleNamespace(), left, tmp_path)


def slow(i):
    time.sleep(0.2)
    return i


def test_a_loaders_workers_outlive_the_signal_that_all_processes_get():
    loader = DataLoader(list(range(4)), num_workers=1, collate_fn=lambda rows: slow(rows[0]), worker_init_fn=stay)
    seen = []
    for i in loader:
        seen.append(i)
        if i == 0:
            os.kill(loader._iterator._workers[0].pid if loader._iterator else worker_of(), signal.SIGTERM)
    assert seen == [0, 1, 2, 3]


def worker_of():
    import multiprocessing

    return multiprocessing.active_children()[0].pid


# ---- spoilt gradients


class Spoil(pl.Callback):
    """Puts a NaN, or a far too long gradient, into one weight's gradient at some steps; each callback sees what the last did."""

    def __init__(self, steps, value=float("nan")):
        self.steps, self.value = steps, value

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step in self.steps:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            parameters[0].grad.flatten()[0] = self.value


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_fused_optimizers_are_clipped_under_autocast(precision, emoji_root, tmp_path):
    """To the weights of the unfused one; Lightning refuses them."""

    def weights(fused):
        stage, scaler = diffusion(), torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
        stage.optimizer = lambda params: torch.optim.SGD(params, lr=1.0, fused=fused)
        plugin = MixedPrecision(precision, "cpu", scaler)
        made = trainer(tmp_path / str(fused), 1, plugins=[plugin], gradient_clip_val=0.01, enable_checkpointing=False)
        made.fit(stage, small(emoji_root))
        return torch.cat([p.detach().flatten() for p in stage.parameters()])

    start = torch.cat([p.detach().flatten() for p in diffusion().parameters()])
    torch.testing.assert_close(weights(True), weights(False))
    assert (weights(True) - start).norm().item() == pytest.approx(0.01, rel=1e-3), "a step of a gradient of norm 0.01"


@pytest.mark.parametrize("fused", [True, False])
def test_a_spoilt_update_is_as_if_it_never_was(fused, emoji_root, tmp_path):
    """Steps 0, 1, skipped 2, 3 leave the weights and moments of the optimizer that saw the other three gradients only."""

    class Skip(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 2:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = None

    def train(*callbacks):
        stage, ema = diffusion(), EMA(0.9)
        stage.optimizer = partial(adamw, fused=fused)
        made = trainer(tmp_path, 4, callbacks=[*callbacks, ema], enable_checkpointing=False)
        made.fit(stage, small(emoji_root))
        return stage.state_dict(), ema.average, made.optimizers[0].state_dict()["state"]

    guard = Guard(str(tmp_path))
    spoilt, wanted = train(Spoil([2]), guard), train(Skip())
    for one, other in zip(spoilt[:2], wanted[:2]):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert all(torch.equal(spoilt[2][i][k], state[k]) for i, state in wanted[2].items() for k in state)
    assert guard.skipped == 1 and guard.row == 0
    line = json.loads((tmp_path / "skipped-0.jsonl").read_text())
    assert line["step"] == 2 and line["positions"] == list(range(16, 24)) and len(line["keys"]) == 8
    assert line["gradient_norm"] == "nan" and line["not_finite"] == []


def test_a_stop_forgets_no_skipped_update(emoji_root, tmp_path, handlers):
    """Spoilt in the step before the stop, which the host has not looked at yet."""
    guard = Guard(str(tmp_path))
    with pytest.raises(SystemExit):
        run(emoji_root, tmp_path, Spoil([1]), guard, Send(signal.SIGTERM, 3))
    saved = read_checkpoint(newest(tmp_path))["callbacks"]["Guard"]
    assert saved["skipped"] == guard.skipped == 1
    assert json.loads((tmp_path / "skipped-0.jsonl").read_text())["step"] == 1


def test_a_spike_is_told_by_the_usual_length(emoji_root, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.callback.guard.WARM", 3)
    guard = Guard(str(tmp_path), spike=100.0)
    made = trainer(tmp_path, 8, callbacks=[Spoil([1, 5], 1e6), guard], enable_checkpointing=False)
    made.fit(diffusion(), small(emoji_root))
    assert [json.loads(line)["step"] for line in (tmp_path / "skipped-0.jsonl").read_text().splitlines()] == [5]


def test_skipped_in_a_row_is_the_end_and_nothing_was_spoilt(emoji_root, tmp_path):
    """A picture that holds NaN spoils autoencoder and discriminator alike; neither moves, and the picture is named."""
    stage, data = against(), small(emoji_root)
    before = {name: weight.clone() for name, weight in stage.state_dict().items()}
    transfer = data.on_after_batch_transfer

    def broken(batch, i=0):
        batch = transfer(batch, i)
        batch["image"][3, 0, 0, 0] = float("nan")
        return batch

    data.on_after_batch_transfer = broken
    made = trainer(tmp_path, 10, callbacks=[Guard(str(tmp_path), patience=2)], enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"At step 1 .* 2 times in a row .* NaN or infinity: \['0000"):
        made.fit(stage, data)
    assert all(torch.equal(stage.state_dict()[name], weight) for name, weight in before.items())
    assert len((tmp_path / "skipped-0.jsonl").read_text().splitlines()) == 2


def test_the_discriminators_own_gradient_is_guarded(emoji_root, tmp_path):
    class Burst(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            module.adversary.network.conv_in.weight.grad.fill_(float("inf"))

    stage = against()
    before = {name: weight.clone() for name, weight in stage.adversary.state_dict().items()}
    trainer(tmp_path, 2, callbacks=[Guard(str(tmp_path)), Burst()], enable_checkpointing=False).fit(stage, small(emoji_root))
    assert all(torch.equal(stage.adversary.state_dict()[name], weight) for name, weight in before.items())
    assert all(weight.isfinite().all() for weight in stage.state_dict().values())


def test_an_optimizer_that_is_not_fused_loses_its_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    skip_where(optimizer, torch.tensor(True))
    optimizer.step()
    assert weight.tolist() == [1, 1] and weight.grad is None


# ---- storage


def test_a_full_disk_is_forgiven_twice_and_costs_nothing(emoji_root, tmp_path, monkeypatch):
    """Saves at 2 to 5 fail: training goes on, the good ones are kept although the disk is full, and the third failure ends it."""
    save, failing = torch.save, []

    def full(checkpoint, file):
        if checkpoint["global_step"] in failing:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)

    def train(steps):
        callbacks = [checkpoint_callback(str(tmp_path), every=1)]
        stage = diffusion()
        trainer(tmp_path, steps, callbacks=callbacks, plugins=[WholeCheckpointIO(forgive=2)]).fit(stage, small(emoji_root))

    failing[:] = [3, 4]
    with pytest.warns(UserWarning, match=r"could not be written .*Training goes on"):
        train(6)
    assert sorted(f.name for f in tmp_path.glob("*.ckpt"))[-2:] == ["step-00000005.ckpt", "step-00000006.ckpt"]
    assert not list(tmp_path.glob(".*")), "no half a file stays"
    failing[:] = [3, 4, 5]
    with pytest.raises(OSError, match="could not be written"):
        train(6)
    assert (tmp_path / "step-00000002.ckpt").exists() and newest(tmp_path) is not None


def test_killed_while_saving_what_was_saved_stands(tmp_path, monkeypatch):
    io, save = WholeCheckpointIO(), torch.save
    io.save_checkpoint({"state_dict": {"a": torch.ones(1000)}, "global_step": 1}, tmp_path / "step-1.ckpt")

    def half(checkpoint, file):
        save(checkpoint, file)
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(torch, "save", half)
    child = os.fork()
    if not child:
        io.save_checkpoint({"state_dict": {"a": torch.zeros(1000)}, "global_step": 2}, tmp_path / "step-1.ckpt")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(tmp_path.glob(".*.part"))) == 1
    found = resume_from("auto", tmp_path)
    assert read_checkpoint(found)["state_dict"]["a"].sum() == 1000
    assert not list(tmp_path.glob(".*.part")), "the half of a file is cleared away"
    (tmp_path / ".step-2.ckpt.part").mkdir()
    (tmp_path / ".step-2.ckpt.part" / "__0_0.distcp").write_text("half")
    assert resume_from("auto", tmp_path) == found and not list(tmp_path.glob(".*.part")), "and the half of a folder"


def test_no_half_of_a_step_is_saved_after_a_resume(emoji_root, tmp_path, handlers):
    """Of a step's two micro-batches the first would be lost to whoever resumed from there."""
    for steps in (2, 3):
        run(emoji_root, tmp_path, steps=steps, every=1, accumulate_grad_batches=2)
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["step-00000002.ckpt", "step-00000003.ckpt"]


def test_a_flipped_bit_is_seen(tmp_path):
    io = WholeCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint({"state_dict": {"a": torch.ones(1000)}, "global_step": step}, tmp_path / f"step-{step}.ckpt")
        os.utime(tmp_path / f"step-{step}.ckpt", (step, step))
    data = bytearray((tmp_path / "step-2.ckpt").read_bytes())
    where = data.find(torch.ones(8).numpy().tobytes())
    data[where + 101] ^= 4
    (tmp_path / "step-2.ckpt").write_bytes(data)
    os.utime(tmp_path / "step-2.ckpt", (2, 2))
    with pytest.warns(UserWarning, match=r"step-2\.ckpt"):
        assert newest(tmp_path).name == "step-1.ckpt"


@pytest.mark.filterwarnings("ignore")
def test_whatever_is_damaged_the_one_before_is_found(tmp_path):
    """A byte changed anywhere: the file is passed over, or holds what it held."""
    io, newer = WholeCheckpointIO(), tmp_path / "step-2.ckpt"
    for step in (1, 2):
        io.save_checkpoint({"state_dict": {"a": torch.ones(4)}, "global_step": step}, tmp_path / f"step-{step}.ckpt")
    os.utime(tmp_path / "step-1.ckpt", (1, 1))
    data, passed = newer.read_bytes(), 0
    for where in range(0, len(data), 11):
        newer.write_bytes(data[:where] + bytes([data[where] ^ 128]) + data[where + 1 :])
        found = newest(tmp_path)
        passed += found != newer
        assert read_checkpoint(found) == {"state_dict": {"a": pytest.approx(torch.ones(4))}, "global_step": 1 + (found == newer)}
    assert passed > 30


def test_lost_storage_is_no_reason_to_lose_what_comes_after(tmp_path):
    """The folder of the run is gone when a checkpoint is due, and back when the next one is."""
    io, folder = WholeCheckpointIO(forgive=1), tmp_path / "gone" / "checkpoints"
    (tmp_path / "gone").write_text("not a folder")
    with pytest.warns(UserWarning, match="Training goes on"):
        io.save_checkpoint({"state_dict": {}, "global_step": 1}, folder / "step-1.ckpt")
    (tmp_path / "gone").unlink()
    io.save_checkpoint({"state_dict": {}, "global_step": 2}, folder / "step-2.ckpt")
    assert newest(Path(folder)).name == "step-2.ckpt" and Preempted(15, "").code == 143
