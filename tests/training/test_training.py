"""Randomness by position, averages, checkpoints, statistics, and two processes against one."""

import errno
import math
import re
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import open_clip
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from helpers.clip import CLIP
from helpers.training import (
    adam,
    autoencoder_stage,
    captioned,
    contrast,
    diffusion,
    small,
    train,
    trainer,
)
from ldm.autoencoder.identity import Identity
from ldm.autoencoder.kl import KL, kl_divergence
from ldm.condition.text import Text
from ldm.denoiser import Denoiser, LogRatio
from ldm.drawing.generate import generate
from ldm.files.folder import load_tensors, save_model, save_tensors, write_text
from ldm.files.metrics import write_metrics
from ldm.guidance.cfg import CFG
from ldm.interop.card import of_run
from ldm.loss.features import Features
from ldm.objective.regression import Regression
from ldm.objective.time import LogitNormal
from ldm.prediction import Flow
from ldm.sampler.ddim import DDIM
from ldm.schedule import Linear
from ldm.tower.cut import Cut
from ldm.training.callback.checkpoint import WholeCheckpointIO, checkpoint_callback
from ldm.training.callback.ema import EMA
from ldm.training.logging import close, give_model, wandb_logger
from ldm.training.optimizer.groups import parameter_groups
from ldm.training.optimizer.muon import Muon, orthogonal
from ldm.training.optimizer.rate import Constant, Cosine, InverseSqrt
from ldm.training.optimizer.rate import Linear as Straight
from ldm.training.run import fit
from ldm.training.saved import newest, read_checkpoint, resume_from
from ldm.training.stage.augment import Augment
from ldm.training.stage.autoencoding import Autoencoding
from ldm.training.stage.contrast import encode_text
from ldm.types import Draw, Moments

# ---- randomness


def test_draws_do_not_depend_on_the_split():
    position = torch.arange(16) + 1000
    whole = Draw(7, position, 16)
    parts = [Draw(7, p, 16) for p in position.split(5)]
    for draw in (lambda d: d.normal("noise", (2, 3)), lambda d: d.uniform("drop"), lambda d: d.stratified("time")):
        assert torch.equal(draw(whole), torch.cat([draw(p) for p in parts]))


def test_streams_seeds_and_positions_are_independent():
    a, b = Draw(0, torch.arange(2000), 8), Draw(1, torch.arange(2000), 8)
    x, y, z = a.normal("x", (4,)), a.normal("y", (4,)), b.normal("x", (4,))
    for other in (y, z, x.roll(1, 0)):
        assert abs((x * other).mean().item()) < 5 / math.sqrt(8000)
    assert x.mean().abs() < 5 / math.sqrt(8000) and abs(x.var().item() - 1) < 5 * math.sqrt(2 / 8000)


def test_stratified_times_cover_every_interval_once_a_global_batch():
    u = Draw(0, torch.arange(64) + 64 * 5, 64).stratified("time")
    assert sorted((u * 64).floor().long().tolist()) == list(range(64))


# ---- optimizers, rates, averages


def test_learning_rates():
    assert [Constant(3)(s) for s in (0, 1, 2, 3, 9)] == [0.25, 0.5, 0.75, 1, 1]
    assert Cosine(110, 10)(60) == pytest.approx(0.5) and Cosine(110, 10)(110) == pytest.approx(0)
    assert Straight(110, 10)(60) == pytest.approx(0.5) and Straight(110, 10, floor=0.1)(500) == pytest.approx(0.1)
    assert InverseSqrt(100)(400) == pytest.approx(0.5) and InverseSqrt(100)(50) == 1


def test_muon_orthogonalises_and_descends():
    values = torch.linalg.svdvals(orthogonal(torch.randn(24, 40)))
    assert 0.6 < values.min() and values.max() < 1.3
    matrix = torch.randn(40, 24)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(orthogonal(matrix).flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.95
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 1))
    x, y = torch.randn(64, 3, 8, 8), torch.randn(64, 1)
    optimizer = Muon(net.parameters(), lr=0.02, adam_lr=1e-3)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 5]
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_captions_are_encoded_up_to_their_end_as_open_clip_encodes_them_whole():
    vision = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 8, "head_width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2}
    net = open_clip.CLIP(8, vision, text, output_dict=False)
    ids = open_clip.SimpleTokenizer(context_length=16)(["red apple", "fox", "a clock on a tree"])
    met = []
    net.transformer.register_forward_pre_hook(lambda module, arguments: met.append(arguments[0].shape[1]))
    torch.testing.assert_close(encode_text(net, ids, torch.device("cpu")), net.encode_text(ids, True))
    net.text_pool_type = "last"
    torch.testing.assert_close(encode_text(net, ids, torch.device("cpu")), net.encode_text(ids, True))
    assert met == [8, 16, 16, 16]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 144), (2, 32, 32)])
def test_muons_rounds_are_five_steps_of_newton_and_schulz(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    x = matrix / matrix.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    torch.testing.assert_close(orthogonal(matrix), x, rtol=0, atol=1e-6)  # 1e-7 beside the norm
    torch.testing.assert_close(orthogonal(matrix.float()), x.float(), rtol=0, atol=1e-4)


def test_muon_moves_weights_of_one_shape_as_each_alone(monkeypatch):
    shapes = [(16, 16, 3, 3), (32, 16), (16, 16, 3, 3), (16, 16, 3, 3), (5,)]
    starts = [torch.randn(shape) for shape in shapes]
    together, alone = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    monkeypatch.setattr("ldm.training.optimizer.muon.TOGETHER", 2 * 16 * 16 * 9)  # two of the three, then the third
    optimizers = [Muon(together, weight_decay=0.1), *(Muon([p], weight_decay=0.1) for p in alone)]
    for _ in range(3):
        for a, b in zip(together, alone):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_muons_small_weights_move_like_adamws():
    a, b = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    mine, theirs = Muon([a], adam_lr=0.1, weight_decay=0.01), torch.optim.AdamW([b], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(5):
        for p, optimizer in ((a, mine), (b, theirs)):
            p.grad = torch.arange(5, dtype=torch.float64) * math.cos(step)
            optimizer.step()
    torch.testing.assert_close(a, b)


class OneWeight(pl.LightningModule):
    """A weight whose gradient is -1: it grows by the rate each step."""

    def __init__(self, fail=False):
        super().__init__()
        self.weight, self.fail = nn.Parameter(torch.zeros(1)), fail
        self.frozen_part = nn.Parameter(torch.ones(1), requires_grad=False)
        self.seen = []

    def training_step(self, batch, _):
        return -self.weight.sum()

    def validation_step(self, batch, _):
        self.seen.append(self.weight.item())
        if self.fail:
            raise RuntimeError("validation broke")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_parameter_groups_cover_every_trained_weight_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    net[2].bias.requires_grad_(False)
    groups = parameter_groups(net.named_parameters(), {r"^0\.": {"scale": 0.1}, "weight": {"weight_decay": 0.5}})
    found = [(g["scale"], g.get("weight_decay"), len(g["params"])) for g in groups]
    assert found == [(0.1, None, 1), (0.1, 0.0, 1), (1.0, 0.5, 1), (1.0, 0.0, 1), (1.0, 0.5, 1)]
    plain = parameter_groups(net.named_parameters())
    assert [(g["scale"], g.get("weight_decay"), len(g["params"])) for g in plain] == [(1.0, None, 2), (1.0, 0.0, 3)]
    with pytest.raises(ValueError, match=r"groups\.nothing: no trained weight"):
        parameter_groups(net.named_parameters(), {"nothing": {}})


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.AdamW, lr=0.1), partial(Muon, lr=0.1, adam_lr=0.1)], ids=["adamw", "muon"]
)
def test_groups_scale_the_rate_and_settle_the_decay(optimizer):
    stage = diffusion()
    stage.optimizer, stage.groups, stage.rate = optimizer, {"conditioner": {"scale": 0.01, "weight_decay": 0.3}}, Constant(1)
    made = stage.configure_optimizers()["optimizer"]
    table = stage.model.conditioner.embedders["label"].table.weight
    for group in made.param_groups:
        told = any(p is table for p in group["params"])
        assert group["lr"] == pytest.approx(0.1 * 0.5 * (0.01 if told else 1))
        assert not told or group["weight_decay"] == 0.3
        assert told or all(p.ndim >= 2 for p in group["params"]) or group["weight_decay"] == 0
    assert sum(len(g["params"]) for g in made.param_groups) == sum(p.requires_grad for p in stage.parameters())


def loaders(n=4):
    return torch.utils.data.DataLoader(torch.zeros(n, 1)), torch.utils.data.DataLoader(torch.zeros(1, 1))


def test_average_is_the_closed_form_and_validation_sees_it(tmp_path):
    ema, module = EMA(decay=0.5), OneWeight()
    trainer(tmp_path, 4, callbacks=[ema], val_check_interval=4, enable_checkpointing=False).fit(module, *loaders())
    wanted = 0.0
    for n in range(1, 5):
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * n
    assert ema.average["weight"].item() == pytest.approx(wanted, rel=1e-6)
    assert module.seen == [pytest.approx(wanted, rel=1e-6)] and module.weight.item() == 4
    assert "frozen_part" not in ema.average and ema.average["weight"].dtype == torch.float32


def test_the_weights_come_back_when_validation_breaks(tmp_path):
    module = OneWeight(fail=True)
    with pytest.raises(RuntimeError, match="validation broke"):
        trainer(tmp_path, 4, callbacks=[EMA(0.5)], val_check_interval=4, enable_checkpointing=False).fit(module, *loaders())
    assert module.weight.item() == 4


# ---- autoencoder


@pytest.fixture
def autoencoding(clip_folder):
    kl = KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4)
    perceptual = Features(f"local-dir:{clip_folder}")
    stage = {"optimizer": adam, "rate": Constant(), "seed": 0, "batch": 8}
    return Autoencoding(
        kl, perceptual, perceptual_weight=0.1, kl_weight=1e-3, l2_weight=1.0, augment=Augment(mirror=0.5), **stage
    )


def test_kl_is_torchs():
    mean, std = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    told, unit = torch.distributions.Normal(mean, std), torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(kl_divergence(mean, std), torch.distributions.kl_divergence(told, unit).mean())


@pytest.mark.parametrize("term", ["l1", "l2", "perceptual"])
def test_each_term_reaches_the_decoder_and_none_the_tower(autoencoding, term):
    batch = {"image": torch.rand(8, 3, 32, 32) * 2 - 1}
    losses = autoencoding.losses(batch, Draw(0, torch.arange(8), 8))
    losses[term].backward()
    assert autoencoding.autoencoder.last_layer.grad.abs().max() > 0
    assert autoencoding.autoencoder.encoder.conv_in.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in autoencoding.perceptual.parameters())


def test_a_picture_is_no_distance_from_itself(autoencoding):
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert autoencoding.perceptual(x, x).item() == 0
    assert autoencoding.perceptual(x, -x).item() > 0


def test_statistics_whiten_the_sampled_latents(autoencoding, emoji_root, tmp_path):
    data = small(emoji_root, size=32)
    trainer(tmp_path, 1).fit(autoencoding, data)
    autoencoding.finish(data)
    kl = autoencoding.autoencoder.eval()
    images = torch.cat([data.on_after_batch_transfer(b, 0)["image"] for b in data.ordered("train", 16)])
    with torch.no_grad():
        moments = kl.encode(images)
        x = moments.sample(torch.randn_like(moments.mean))
    numbers = x.numel() / 2
    assert kl.count.item() == len(data.train_set) == len(images)
    assert x.mean((0, 2, 3)).abs().max() < 6 / math.sqrt(numbers)
    assert (x.std((0, 2, 3)) - 1).abs().max() < 6 / math.sqrt(2 * numbers)


# ---- checkpoints and resuming


def test_a_checkpoint_is_plain_and_leaves_the_frozen_out(emoji_root, tmp_path):
    stage = diffusion()
    stage.frozen = ("model.autoencoder", "model.denoiser.backbone.level")
    callbacks = [checkpoint_callback(str(tmp_path), every=1), EMA(0.9)]
    trainer(tmp_path, 4, callbacks=callbacks).fit(stage, small(emoji_root))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert [f.name for f in files] == ["step-00000003.ckpt", "step-00000004.ckpt"]
    checkpoint = torch.load(files[-1], weights_only=True)
    assert checkpoint["global_step"] == 4 and checkpoint["recipe"] == {"a": 1}
    assert not [k for k in checkpoint["state_dict"] if "backbone.level" in k]
    with pytest.raises(ValueError, match="keep at least 2"):
        checkpoint_callback(str(tmp_path), every=1, keep=1)


def test_a_checkpoint_of_another_model_is_refused():
    state, other = diffusion().state_dict(), diffusion()
    other.model.denoiser.backbone.out[2] = nn.Conv2d(8, 5, 3)
    with pytest.raises(
        ValueError, match=r"of another model \(2 entries differ\).*\(3, 8, 3, 3\) instead of \(5, 8, 3, 3\).*resume=never"
    ):
        other.load_state_dict(state)


def test_the_newest_good_checkpoint_is_found(tmp_path):
    (tmp_path / "removed.ckpt").symlink_to(tmp_path / "nowhere")  # as one that another process takes away meanwhile
    io = WholeCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint({"state_dict": {"a": torch.ones(100)}, "global_step": step}, tmp_path / f"step-{step}.ckpt")
    whole = (tmp_path / "step-2.ckpt").read_bytes()
    (tmp_path / "step-3.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"step-3\.ckpt is no whole checkpoint"):
        assert newest(tmp_path).name == "step-2.ckpt"
    assert resume_from("never", tmp_path) is None and newest(tmp_path / "empty") is None
    with pytest.raises(FileNotFoundError, match="resume=nowhere"):
        resume_from("nowhere", tmp_path)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no training checkpoint"):
        read_checkpoint(tmp_path / "other.pt")


class Evil:
    def __reduce__(self):
        return (print, ("owned",))


def test_a_checkpoint_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "global_step": 1, "x": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert "owned" not in capsys.readouterr().out


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint({"state_dict": {}, "global_step": 1}, path)

    def full(checkpoint, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last\.ckpt could not be written .*nothing that was saved before is lost"):
        io.save_checkpoint({"state_dict": {}, "global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_cut_off_model_names_itself(tmp_path):
    save_tensors({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:500])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_tensors(tmp_path / "model.safetensors")
    write_text("x", tmp_path / "deep" / "file.txt")
    assert (tmp_path / "deep" / "file.txt").read_text() == "x"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_is_exact_twice_in_a_row_and_across_epochs(emoji_root, tmp_path, accumulate):
    """12 steps of 8 are more than an epoch of the 60-odd training pictures."""
    whole, average = train(emoji_root, tmp_path, [12], accumulate_grad_batches=accumulate)
    legs, other = train(emoji_root, tmp_path, [3, 7, 12], accumulate_grad_batches=accumulate)
    assert all(torch.equal(whole[k], legs[k]) for k in whole)
    assert all(torch.equal(average[k], other[k]) for k in average)


def test_an_autoencoder_resumes_exactly(emoji_root, tmp_path):
    """Muon's momentum and both its groups' rates come back; mirroring and posterior draws go on."""

    def run(legs):
        checkpoint = None
        for steps in legs:
            stage = autoencoder_stage()
            stage.rate = Cosine(6, warmup=2)
            one = trainer(tmp_path, steps, enable_checkpointing=False)
            one.fit(stage, small(emoji_root), ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / f"{len(legs)}-{steps}.ckpt"
            one.save_checkpoint(checkpoint, weights_only=False)
        return stage.state_dict()

    whole, legs = run([6]), run([2, 4, 6])
    assert all(torch.equal(whole[name], legs[name]) for name in whole)


class Curious(pl.Callback):
    """Spends random numbers, as a preview may."""

    def on_train_batch_end(self, *_):
        torch.randn(10)


def test_looking_does_not_change_what_is_trained(emoji_root, tmp_path):
    """Validation, previews, other users of the global generator: the weights are the same without them."""
    from ldm.guidance.cfg import CFG
    from ldm.sampler.ddim import DDIM
    from ldm.training.callback.preview import Drawings

    quiet, looked = diffusion(), diffusion()
    trainer(tmp_path, 4, enable_checkpointing=False).fit(quiet, small(emoji_root))
    drawings = Drawings(str(tmp_path / "previews"), 2, DDIM(2), CFG(2.0), size=8, count=4)
    callbacks = [EMA(0.9), drawings, Curious()]
    torch.manual_seed(123)
    busy = trainer(tmp_path, 4, callbacks=callbacks, enable_checkpointing=False, val_check_interval=2)
    busy.fit(looked, small(emoji_root))
    assert sorted(f.name for f in (tmp_path / "previews").iterdir()) == ["00000002.png", "00000004.png"]
    weights = looked.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in quiet.state_dict().items())


class Interrupt(pl.Callback):
    """A person's Ctrl-C after some steps."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_exports_nothing_and_goes_on(emoji_root, tmp_path, after, capsys):
    whole, folder = autoencoder_stage(), tmp_path / "run"
    fit(whole, small(emoji_root), trainer(tmp_path, 5), tmp_path / "whole")

    def run(*callbacks):
        stage = autoencoder_stage()
        callbacks = [checkpoint_callback(str(folder / "checkpoints"), every=2), *callbacks]
        try:
            fit(stage, small(emoji_root), trainer(tmp_path, 5, callbacks=callbacks), folder)
        except (KeyboardInterrupt, SystemExit):
            pass
        return stage

    run(Interrupt(after))
    how = "begins anew" if after == 1 else "goes on from .*step-00000002.ckpt"
    assert re.search(rf"Stopped at step {after}. The same command {how}", capsys.readouterr().out)
    assert not (folder / "model.safetensors").exists() and not list(tmp_path.rglob("*.part"))
    run()
    exported, wanted = (load_tensors(f / "model.safetensors") for f in (folder, tmp_path / "whole"))
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)


def test_a_finished_run_is_not_trained_again(emoji_root, tmp_path):
    for _ in range(2):
        fit(autoencoder_stage(), small(emoji_root), trainer(tmp_path, 2), tmp_path)
        files = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.suffix == ".safetensors"}
        assert len(files) == 1
    assert [f.name for f in tmp_path.rglob("*.ckpt")] == ["step-00000002.ckpt"]


# ---- the contrastive stage


def test_clip_statistics_are_those_of_the_training_captions(emoji_root, tmp_path):
    """Measured by hand over all words of all captions; whitened by them, tokens and vector have mean 0 and covariance 1."""
    from helpers.clip import CLIP

    data, stage = captioned(emoji_root), contrast(CLIP)
    stage.recipe = {"clip": CLIP}
    stage.eval()
    stage.finish(data)
    stage.export(tmp_path)
    captions = data.train_set.captions()
    told = Text(f"local-dir:{tmp_path}", layers=[0, -1], pooled=True)(captions, torch.zeros(len(captions), dtype=torch.bool))
    words = told.tokens[told.mask].double()
    table = load_tensors(tmp_path / "statistics.safetensors")
    width = CLIP["text_cfg"]["width"]
    by_hand = {"layer.0": words[:, :width], "layer.2": words[:, width:], "pooled": told.vector.double()}
    for name, rows in by_hand.items():
        torch.testing.assert_close(table[f"{name}.mean"].double(), rows.mean(0), atol=1e-5, rtol=1e-4)
        covariance = torch.cov(rows.T, correction=0)
        torch.testing.assert_close(table[f"{name}.covariance"].double(), covariance, atol=1e-5, rtol=1e-4)
    white = Text(f"local-dir:{tmp_path}", layers=[0, -1], pooled=True, whiten=True)(captions, torch.zeros(len(captions)).bool())
    for rows, parts in ((white.tokens[white.mask], 2), (white.vector, 1)):
        assert rows.mean(0).abs().max() < 1e-3
        for x in rows.chunk(parts, dim=1):
            values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
            assert values.max() < 1.0 + 1e-3 and values.max() > 0.9, "the ridge only shrinks"


def test_the_exported_clip_is_open_clips(emoji_root, tmp_path):
    from helpers.clip import CLIP

    stage = contrast(CLIP)
    stage.recipe = {"clip": CLIP}
    stage.export(tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images, ids = torch.randn(2, 3, 32, 32), stage.tokenizer(["a", "b c"])
    stage.eval()
    torch.testing.assert_close(theirs.encode_image(images), stage.clip.encode_image(images))
    torch.testing.assert_close(theirs.encode_text(ids), stage.clip.encode_text(ids))


def test_regression_of_silence_is_the_targets_power():
    """A network that says nothing has the loss E |noise - x|^2 = 2 on unit data, whatever the times."""

    class Silent(nn.Module):
        def forward(self, x, noise_level, cond):
            return torch.zeros_like(x)

    from ldm.types import Cond

    x, position = torch.randn(256, 4, 8, 8), torch.arange(256)
    model = SimpleNamespace(denoiser=Denoiser(Silent(), Linear(), Flow(), LogRatio()))
    objective = Regression(LogitNormal())
    loss = objective(model, {}, x, Cond(), Draw(0, position, 256))["loss"].item()
    assert loss == pytest.approx(2, abs=5 * math.sqrt(8 / x.numel()))
    parts = [objective(model, {}, x[r], Cond(), Draw(0, position[r], 256))["loss"].item() for r in position.split(64)]
    assert sum(parts) / 4 == pytest.approx(loss, rel=1e-5)


def test_each_job_of_a_multirun_has_a_wandb_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    save_model({"x": torch.ones(3)}, {"_target_": "any"}, tmp_path / "model")
    for name in ("emoji/text-1", "emoji/text-2"):
        logger = wandb_logger(name, "ldm", str(tmp_path), offline=True, artifacts="model")
        logger.log_hyperparams({"seed": 1})
        assert logger.experiment.id == name.replace("/", "-")
        give_model([logger], tmp_path / "model", lambda: "# A card")
        close([logger])
        (kept,) = tmp_path.rglob(f"*{logger.experiment.id}.wandb")
        words = (f"model-{logger.experiment.id}", "model.safetensors", "README.md", "# A card")
        last = time.monotonic() + 60  # wandb's own process may write them a little later
        while (missing := [word for word in words if word.encode() not in kept.read_bytes()]) and time.monotonic() < last:
            time.sleep(0.1)
        assert not missing


@pytest.mark.parametrize("artifacts", [None, "model", "all"])
def test_wandb_is_given_checkpoints_and_the_model_on_request(artifacts, emoji_root, tmp_path, monkeypatch):
    """By a stand-in for wandb's run: what is given, and that nothing is unless it was asked for."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    given = []
    logger = wandb_logger("emoji/text-1", "ldm", str(tmp_path), artifacts=artifacts)
    logger._experiment = SimpleNamespace(id="emoji-text-1", log=lambda numbers: None, log_artifact=given.append)
    saving = checkpoint_callback(str(tmp_path / "checkpoints"), every=2)
    stage, folder = diffusion(), tmp_path / "run"
    assert fit(stage, small(emoji_root), trainer(folder, 4, logger=[logger], callbacks=[saving]), folder)
    (folder / "previews").mkdir()
    (folder / "previews" / "1.png").write_bytes(b"no part of the model")
    (folder / "config.yaml").write_text("seed: 3\n")
    (folder / "evaluation" / "0004").mkdir(parents=True)
    entry = {"value": 2.5, "error": None, "protocol": {"count": 7}}
    write_metrics({"fid": entry}, folder / "evaluation" / "0004")
    give_model([logger], folder, lambda: of_run(folder))
    told = {artifact.name: sorted(artifact.manifest.entries) for artifact in given}
    model = {"model-emoji-text-1": ["README.md", "config.json", "model.safetensors"]}
    assert told == {None: {}, "model": model, "all": {**model, "checkpoint-emoji-text-1": ["step-00000004.ckpt"]}}[artifacts]
    assert len(given) == {None: 0, "model": 1, "all": 3}[artifacts], "the checkpoints of steps 2 and 4"
    if given:
        assert all(word in given[-1].description for word in ("# run", "seed: 3", "**fid: 2.5**", "license: unknown"))


def test_what_wandb_cannot_be_given_is_refused():
    with pytest.raises(ValueError, match=r"logger\.wandb\.artifacts=yes: wanted null, model, or all"):
        wandb_logger("a", "ldm", "runs", artifacts="yes")


class Overflowing(Identity):
    """An autoencoder whose numbers are too large for 16 bits."""

    def encode(self, images):
        moments = super().encode(images)
        return Moments(moments.mean * 1e30, moments.std)


def test_latents_that_overflow_in_16_bits_are_refused(emoji_root, tmp_path):
    stage = diffusion()
    stage.model.autoencoder = Overflowing()
    image = torch.rand(2, 3, 8, 8) + 0.5
    assert stage.moments({"image": image}).mean.isfinite().all(), "float32 holds them"
    stage = diffusion()
    stage.model.autoencoder = Overflowing()
    with pytest.raises(ValueError, match=r"not finite.*madebyollin/sdxl-vae-fp16-fix.*bf16-mixed"):
        stage.moments({"image": (image * 1e9).clone()})


def test_a_picture_that_overflows_when_it_is_decoded_is_refused():
    model = diffusion().model
    model.autoencoder.decode = lambda latents: latents.abs() * 1e38 * 1e38
    with pytest.raises(ValueError, match=r"decodes to what is not finite.*madebyollin/sdxl-vae-fp16-fix"):
        generate(model, {"label": torch.zeros(1, dtype=torch.int64)}, DDIM(1), CFG(1.0), [0], (8, 8))


def test_a_frozen_part_that_changed_where_it_lies_is_refused_by_name():
    checkpoint, stage = {}, diffusion()
    stage.frozen = ("model.autoencoder", "model.conditioner.embedders.label")  # the first has no weights
    stage.on_save_checkpoint(checkpoint)
    assert list(checkpoint["frozen"]) == ["model.conditioner.embedders.label"]
    for change, refused in ((0, False), (1e-3, True)):
        again = diffusion()
        again.frozen = stage.frozen
        again.model.conditioner.embedders["label"].table.weight.data += change
        with (
            pytest.raises(ValueError, match=r"frozen model\.conditioner\.embedders\.label, .* run_id=NAME")
            if refused
            else nullcontext()
        ):
            again.on_load_checkpoint(checkpoint)
    again.on_load_checkpoint({key: value for key, value in checkpoint.items() if key != "frozen"})


def test_captions_that_a_clip_cuts_in_training_are_counted(capsys):
    stage = contrast(CLIP)
    stage.cut.count(["a " * 40, "a", "b"], [True, False, False])
    stage.on_train_end()
    stage.on_train_end()
    assert capsys.readouterr().out.count("1 of the first 3 captions are longer than the 10 tokens") == 1


def test_cut_captions_are_said_once(capsys):
    stage = diffusion()
    cut = Cut(10, len)
    cut.seen, cut.cut, cut.longest = 999, 3, 40
    stage.model.conditioner.embedders["label"].cut = cut
    stage.on_train_batch_end()
    assert not capsys.readouterr().out
    cut.seen = 1010
    for _ in range(2):
        stage.on_train_batch_end()
    stage.on_train_end()
    assert capsys.readouterr().out.count("condition.label: 3 of the first 1,010 captions") == 1
