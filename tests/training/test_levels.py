"""Held-out errors: fixed by the sample, equal to closed forms, the same however validation is split."""

import pytest
import torch
from torch import nn

from ldm.denoiser import Denoiser, LogRatio
from ldm.objective.regression import Regression
from ldm.prediction import Data, Flow, Noise, Velocity
from ldm.schedule import Cosine, Karras, Linear, ScaledLinear
from ldm.training.callback.levels import LEVELS, NAME, curve, level_errors
from ldm.types import Cond, Draw

POSITION = torch.arange(600)
X = torch.randn(600, 4, 8, 8, generator=torch.Generator().manual_seed(1))
SNR = torch.tensor([float(level) for level in LEVELS]).exp()


class Known(nn.Module):
    """Says what the best linear denoiser of unit data says, in the terms of its prediction."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction

    def forward(self, x_t, t, cond):
        alpha, sigma = (s.reshape(-1, 1, 1, 1) for s in self.schedule(t))
        return alpha / (alpha**2 + sigma**2) * x_t


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Karras(), ScaledLinear()], ids=lambda s: type(s).__name__)
def test_the_best_denoiser_of_unit_noise_knows_nothing_of_the_velocity(schedule):
    """Its x_hat has the error 1 / (1 + SNR), so that the curve is 1 at every level, on every schedule."""
    numbers = curve(level_errors(Known(schedule, None), X, Cond(), Draw(0, POSITION, 64)))
    assert [numbers[NAME.format(level)] for level in LEVELS] == pytest.approx([1.0] * len(LEVELS), abs=0.07)
    assert numbers["val/error"] == pytest.approx(1, abs=0.03)


class Echo(nn.Module):
    def forward(self, x, noise_level, cond):
        return torch.sin(x)


@pytest.mark.parametrize("prediction", [Data(), Noise(), Flow(), Velocity()], ids=repr)
def test_the_curve_does_not_depend_on_how_validation_is_split(prediction):
    denoiser = Denoiser(Echo(), Cosine(), prediction, LogRatio())
    whole = level_errors(denoiser, X, Cond(), Draw(0, POSITION, 64))
    parts = sum(level_errors(denoiser, X[r], Cond(), Draw(0, POSITION[r], 64)) for r in POSITION.flip(0).split(35))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-8)
    assert whole[1].tolist() == [100] * 6


def test_validation_is_the_same_for_every_seed_and_batch_size(emoji_root, tmp_path):
    """To four digits and more; and is logged level by level."""
    from helpers.training import diffusion, small, trainer
    from ldm.training.callback.levels import LevelCurve

    seen = []
    for seed, batch in ((0, 4), (7, 9)):
        stage = diffusion(batch=batch)
        stage.seed = seed
        data = small(emoji_root, batch=batch)
        runner = trainer(tmp_path, 1, enable_checkpointing=False)
        runner.callbacks.append(LevelCurve(str(tmp_path)))
        runner.validate(stage, data, verbose=False)
        seen.append({name: float(value) for name, value in runner.callback_metrics.items()})
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    assert {"val/loss", "val/error", *(NAME.format(level) for level in LEVELS)} <= seen[0].keys()
    assert (tmp_path / "levels.png").is_file()


def test_times_of_validation_cover_all_levels():
    """Whatever the batch: sample i is in interval i modulo 64."""
    u = Draw(0, POSITION, 64).stratified("time")
    assert torch.equal((u * 64).floor().long(), POSITION % 64)
    assert torch.equal(u[35:70], Draw(0, POSITION[35:70], 64).stratified("time"))
    assert Regression().time(u, Linear()).shape == u.shape
