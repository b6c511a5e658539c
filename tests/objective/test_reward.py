"""Rewards: drawings are those of sampler=ddim, gradients are of the last steps alone, and a rule reward rises."""

import pytest
import torch

from helpers.training import diffusion
from ldm.objective.reward import Colour, Reward, draw_last
from ldm.sampler.ddim import DDIM
from ldm.schedule import Cosine, Linear
from ldm.training.optimizer.rate import Constant
from ldm.training.stage.diffusion import Diffusion, Trained
from ldm.types import Cond, Draw

BATCH = {"image": torch.zeros(4, 3, 8, 8), "label": torch.arange(4), "position": torch.arange(4)}
DRAW = Draw(0, torch.arange(4), 4)


@pytest.mark.parametrize("last", [1, 2, 4])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=repr)
def test_it_draws_as_the_sampler_does_and_differentiates_the_last_steps(schedule, last):
    """x_hat = w x_t: the derivative by w is that of the last steps' w, the finite difference of which is taken."""
    noise, w = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def denoise(x, t):
        return w * x

    drawn = draw_last(denoise, schedule, noise, 4, last)
    torch.testing.assert_close(drawn, DDIM(4)(denoise, schedule, noise, range(4)))

    def later(value):
        calls = iter([0.3] * (4 - last) + [value] * last)
        return draw_last(lambda x, t: next(calls) * x, schedule, noise, 4, 4).sum()

    slope = (later(0.3 + 1e-6) - later(0.3 - 1e-6)) / 2e-6
    assert torch.autograd.grad(drawn.sum(), w)[0].item() == pytest.approx(slope.item(), rel=1e-6)


def test_a_rule_reward_rises_and_reaches_what_is_trained():
    model = diffusion().model.train()
    objective = Reward(Colour(), steps=3, last=2, scale=2.0)
    optimizer, seen = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for _ in range(8):
        said = objective(Trained(model, lambda: model), BATCH, BATCH["image"], Cond(), DRAW)
        optimizer.zero_grad()
        said["loss"].backward()
        optimizer.step()
        seen.append(said["reward"].item())
    assert seen[-1] > seen[0] and said["loss"] == -said["reward"]
    assert model.conditioner.embedders["label"].table.weight.grad.any()
    best = Colour((0.5, 0.5, 0.5))(torch.full((2, 3, 4, 4), 0.5), {})
    assert torch.equal(best, torch.zeros(2)) and (Colour()(torch.zeros(2, 3, 4, 4), {}) == -1).all()


def test_nothing_is_dropped_and_what_does_not_go_is_named():
    stage = diffusion()
    stage = Diffusion(model=stage.model, objective=Reward(Colour(), 2), optimizer=None, rate=Constant(), seed=0, batch=4)
    assert stage.asks and stage.train().losses(BATCH, DRAW)["reward"].isfinite()
    for last in (0, 3):
        with pytest.raises(ValueError, match=rf"objective\.last={last} of objective\.steps=2"):
            Reward(Colour(), steps=2, last=last)
