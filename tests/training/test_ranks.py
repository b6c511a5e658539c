"""Two processes, as torchrun starts them: sharded or not they train as one, stop as one, skip as one, and one may die."""

import os
import shutil
import signal

import pytest
import torch

from helpers.blocks import gradients
from helpers.processes import together, torchrun
from helpers.ranks import SpoilLoss, measured, on_each_rank, three_stages, train
from helpers.training import assert_same, diffusion
from ldm.training.callback.throughput import Throughput
from ldm.training.saved import newest, read_checkpoint


def held(path):
    """Weights, averages and the optimizer's state in a checkpoint, by name."""
    checkpoint = read_checkpoint(path)
    states = {f"{i}/{k}": v for i, s in checkpoint["optimizer_states"][0]["state"].items() for k, v in s.items()}
    average = {f"average/{k}": v for k, v in checkpoint["callbacks"]["EMA"]["average"].items()}
    return checkpoint["state_dict"] | average | states


@pytest.fixture(scope="module")
def two(emoji_root, tmp_path_factory):
    """The folder in which two processes did all of it."""
    folder = tmp_path_factory.mktemp("two")
    codes, said = together(lambda: on_each_rank(emoji_root, folder), torchrun(2), folder)
    assert (folder / "killed").exists(), said
    assert codes == [1, -signal.SIGKILL], "one rank was killed, and the other did not wait for it for ever"
    return folder


@pytest.fixture(scope="module")
def one(emoji_root, tmp_path_factory):
    """One process on the same global batches, and the same where step 1 is spoilt."""
    folder = tmp_path_factory.mktemp("one")
    speed = Throughput(peak=1.0)
    plain, spoilt = train(emoji_root, folder / "plain", 3)[1], train(emoji_root, folder / "spoilt", 3, SpoilLoss(1), speed)[1]
    told = {"flops": speed.flops, "brightness": measured(emoji_root, folder / "measured")}
    return {False: held(plain), True: held(spoilt)} | told | three_stages(emoji_root, folder)


@pytest.mark.parametrize("name", ["sharded", "folders", "both", "spoilt"])
def test_two_ranks_are_one(name, one, two):
    """Weights, averages and moments; from a file, from a folder read twice, from DDP into shards, past a spoilt step."""
    wanted, found = one[name == "spoilt"], held(newest(two / name))
    assert newest(two / name).is_dir() == (name == "folders")
    assert_same(found, wanted)


@pytest.mark.parametrize("name", ["all", "both", "adapters"])
def test_two_ranks_train_every_stage_as_one(name, one, two):
    """Contrast, autoencoding, diffusion, statistics; adaptive weight, discriminator, codebook counts and dead codes; adapters."""
    assert_same(torch.load(two / f"{name}.pt", weights_only=True), one[name])


def test_transformers_shared_out_and_recomputed_by_block_are_one(two):
    """DiT, with tokens crossed to or joint, MMDiT and Flux: the gradients of a mean over both ranks' samples."""
    found, wanted = torch.load(two / "gradients-0.pt", weights_only=True), gradients()
    assert found.keys() == wanted.keys() and {name.split()[0] for name in wanted} == {"dit", "mmdit", "flux"}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


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


def test_metrics_while_training_are_the_same_where_weights_are_shared_out(one, two):
    """Though one rank draws more pictures than the other, and so runs the network more often."""
    assert torch.load(two / "told.pt")["brightness"] == pytest.approx(one["brightness"], abs=1e-4)


def test_a_sharded_model_is_exported_whole(two):
    from ldm.files.folder import load_tensors

    weights, own = load_tensors(two / "exported" / "model.safetensors"), diffusion().model.state_dict()
    assert {name: weight.shape for name, weight in weights.items()} == {name: weight.shape for name, weight in own.items()}


def test_a_signal_to_one_rank_stops_both_after_the_next_step(two):
    assert read_checkpoint(newest(two / "stopped"))["global_step"] == 3


def test_a_killed_rank_costs_what_came_after_the_last_checkpoint(two):
    assert read_checkpoint(newest(two / "killed"))["global_step"] == 2
