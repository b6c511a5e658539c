"""What an objective of one's own is given: the model and its average, the batch, the step; and what it may own."""

import pytest
import torch
from torch import nn

from helpers.training import adam, diffusion, small, trainer
from ldm.backbone.dit import DiT
from ldm.backbone.mlp import MLP
from ldm.backbone.unet import Stage, UNet
from ldm.objective.regression import Regression
from ldm.training.callback.compile import blocks_of
from ldm.training.callback.ema import EMA
from ldm.training.optimizer.rate import Constant
from ldm.training.saved import read_checkpoint
from ldm.training.stage.diffusion import Diffusion
from ldm.types import Draw, Widths

POSITION = torch.arange(8)
BATCH = {"image": torch.randn(8, 3, 8, 8), "label": torch.arange(8), "position": POSITION}


class Distilled(nn.Module):
    """Draws the model to its average, to a frozen teacher of features, and to the null condition; sees all that it is given."""

    frozen = ("teacher",)

    def __init__(self, extra=None):
        super().__init__()
        self.teacher, self.head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5)), nn.Conv2d(8, 4, 1)
        self.regression, self.seen, self.extra = Regression(), [], extra or {}

    def forward(self, model, batch, x, cond, draw):
        hidden = []
        first = model.denoiser.backbone.blocks[0]
        hook = first.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        loss = self.regression(model, batch, x, cond, draw)["loss"]
        hook.remove()
        alike = (self.head(hidden[0]) - self.teacher(batch["image"])).square().mean()
        t, null = torch.tensor(0.5), model.condition(batch, only=())
        with torch.no_grad():
            target = model.average.denoiser(x, t, model.average.condition(batch))
        away = (model.denoiser(x, t, null) - target).square().mean()
        self.seen.append((draw.step, model.average, self.teacher.training))
        return {"loss": loss + alike + away, "alike": alike, **self.extra}


def stage_of(objective):
    stage = Diffusion(model=diffusion().model, objective=objective, optimizer=adam, rate=Constant(), seed=0, batch=8)
    stage.frozen, stage.recipe = ("model.autoencoder", *stage.frozen), {"a": 1}
    return stage


def test_an_objective_sees_the_step_the_batch_the_average_and_a_teacher(emoji_root, tmp_path):
    """Its frozen module does not move, stays in evaluation mode and is in no checkpoint; the average is the callback's own."""
    stage, ema = stage_of(Distilled()), EMA(0.5)
    teacher = {name: x.clone() for name, x in stage.objective.teacher.state_dict().items()}
    run = trainer(tmp_path, 3, callbacks=[ema], enable_checkpointing=False)
    run.fit(stage, small(emoji_root))
    steps, averages, training = zip(*stage.objective.seen)
    assert steps == (0, 1, 2) and not any(training)
    assert all(average is averages[0] for average in averages) and averages[0] is not stage.model
    held = dict(averages[0].named_parameters())
    assert all(torch.equal(x, ema.average[f"model.{name}"]) and not x.requires_grad for name, x in held.items())
    assert any(not torch.equal(x, held[name]) for name, x in stage.model.named_parameters())
    assert all(torch.equal(x, stage.objective.teacher.state_dict()[name]) for name, x in teacher.items())
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert "objective.head.weight" in kept and not [name for name in kept if "teacher" in name]
    again = stage_of(Distilled())
    again.load_state_dict(kept)
    assert torch.equal(again.objective.head.weight, stage.objective.head.weight)


def test_before_training_and_in_validation_the_average_is_the_model():
    stage = stage_of(Distilled())
    draw = Draw(0, POSITION, 8)
    for mode in (True, False):
        stage.train(mode).losses(BATCH, draw)
    assert [(average, training) for _, average, training in stage.objective.seen] == [(stage.model, False)] * 2
    assert (draw.step, Draw(0, POSITION, 8, 5).step) == (0, 5)


def test_an_average_that_nobody_keeps_is_named(emoji_root, tmp_path):
    with pytest.raises(ValueError, match=r"averaged weights, and none are kept: use callback=\[checkpoint,bar,ema\]"):
        trainer(tmp_path, 1, callbacks=[], enable_checkpointing=False).fit(stage_of(Distilled()), small(emoji_root))


def test_the_loss_of_a_second_network_is_refused_as_long_as_nothing_steps_it():
    with pytest.raises(ValueError, match=r"Distilled gives the loss of a second network \(critic\)"):
        stage_of(Distilled({"critic": torch.zeros(())})).losses(BATCH, Draw(0, POSITION, 8))


class Old(nn.Module):
    def forward(self, denoiser, x, cond, draw):
        return {"loss": x.mean()}


def test_an_objective_of_before_is_told_what_it_is_given_now():
    with pytest.raises(ValueError, match=r"objective=Old takes \(denoiser, x, cond, draw\).*\(model, batch, x, cond, draw\)"):
        stage_of(Old())


class Plain(nn.Module):
    """A backbone of one's own, without blocks."""

    def __init__(self, blocks=3):
        super().__init__()
        self.blocks, self.layer = blocks, nn.Conv2d(3, 3, 1)


def test_blocks_are_the_ones_that_were_compiled_one_by_one():
    """In order: every list that a backbone holds, member by member."""
    widths = Widths(tokens=4)
    unet = UNet(3, widths, width=8, mult=(1, 1), res_blocks=1, depth=(0, 1), heads=2, groups=4)
    for net in (unet, MLP(3, widths, size=4, width=8, depth=2), DiT(3, Widths(), size=4, width=8, depth=2, heads=2)):
        lists = [m for m in net.children() if isinstance(m, nn.ModuleList | Stage)]
        assert list(net.blocks) == blocks_of(net) == [block for each in lists for block in each] and len(blocks_of(net)) > 1
    plain = Plain()
    assert blocks_of(plain) == [plain] and blocks_of(nn.ModuleList([plain])) == [plain]
