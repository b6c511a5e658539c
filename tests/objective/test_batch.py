"""Objectives whose samples see each other: coupled noise and contrasts, by brute force, by closed form, and on two processes."""

from itertools import permutations

import pytest
import torch
from torch import nn

from ldm.denoiser import DataTime, Denoiser
from ldm.objective import _together
from ldm.objective.contrastive import Contrastive
from ldm.objective.noise import Coupled, Normal
from ldm.objective.regression import Regression
from ldm.prediction import Flow, Velocity
from ldm.schedule import Cosine, Linear
from ldm.types import Cond, Draw, like

X = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(3))
POSITION = torch.tensor([14, 12, 17, 13, 16, 15])
DRAW = Draw(5, POSITION, 6)


def test_coupled_noise_is_the_same_numbers_in_the_nearest_of_all_orders():
    noise, coupled = Normal()(DRAW, X), Coupled()(DRAW, X)

    def length(order):
        return (noise[list(order)] - X).square().sum().item()

    best = min(permutations(range(6)), key=length)
    assert torch.equal(coupled, noise[list(best)]) and length(best) < length(range(6))


def test_the_order_of_a_batch_does_not_matter():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = Coupled()(Draw(5, POSITION[order], 6), X[order])
    assert torch.equal(moved, Coupled()(DRAW, X)[order])


def split(monkeypatch, make):
    """The same on two processes of three samples each, which hear of each other's."""
    halves = (slice(0, 3), slice(3, 6))
    whole = [POSITION, X, torch.cat([Normal()(Draw(5, POSITION[here], 6), X[here]) for here in halves])]

    def on(rank, here):
        monkeypatch.setattr(_together, "rank", lambda: rank)
        monkeypatch.setattr(_together, "_gathered", lambda value: next(g for g in whole if torch.equal(g[here], value)))
        return make(Draw(5, POSITION[here], 6), X[here])

    monkeypatch.setattr(_together, "world", lambda: 2)
    return [on(rank, here) for rank, here in enumerate(halves)]


def test_two_processes_couple_and_contrast_as_one(monkeypatch):
    wanted, net = Coupled()(DRAW, X), Model(Linear(), Flow())
    loss = Contrastive()(net, {}, X, Cond(), DRAW)["loss"]
    assert torch.equal(torch.cat(split(monkeypatch, Coupled())), wanted)
    halves = split(monkeypatch, lambda draw, x: Contrastive()(net, {}, x, Cond(), draw)["loss"])
    torch.testing.assert_close(sum(halves) / 2, loss)


def test_validation_couples_what_a_process_has(monkeypatch):
    monkeypatch.setattr(_together, "world", lambda: 2)
    with torch.no_grad():
        assert Coupled()(DRAW, X).shape == X.shape


class Model:
    """Says half of what it hears."""

    class Echo(nn.Module):
        def forward(self, x, noise_level, cond):
            return x / 2

    def __init__(self, schedule, prediction):
        self.denoiser = Denoiser(self.Echo(), schedule, prediction, DataTime())


@pytest.mark.parametrize("schedule, prediction", [(Linear(), Flow()), (Cosine(), Velocity())], ids=str)
def test_the_contrast_is_the_papers(schedule, prediction):
    """||v - target||^2 - 0.05 ||v - target'||^2 with another sample's target; without it, the plain loss to the bit."""
    net = Model(schedule, prediction)
    said = Contrastive()(net, {}, X, Cond(), DRAW)
    plain = Regression()
    t, noise = plain.time(DRAW.stratified("time"), schedule), Normal()(DRAW, X)
    alpha, sigma = (like(s, X) for s in schedule(t))
    v, other = (
        (alpha * X + sigma * noise) / 2 / torch.hypot(alpha, sigma),
        [POSITION.tolist().index(12 + (p - 11) % 6) for p in POSITION],
    )
    near, far = ((v - prediction.target(X[o], noise[o], alpha, sigma)).square().mean() for o in (list(range(6)), other))
    torch.testing.assert_close(said["loss"], near - 0.05 * far)
    assert torch.equal(Contrastive(away=0.0)(net, {}, X, Cond(), DRAW)["loss"], plain(net, {}, X, Cond(), DRAW)["loss"])


def test_its_best_answer_is_further_from_the_mean():
    """(E[v] - away E[v']) / (1 - away) of targets v given what the network is told, v' of all: there no gradient is left."""
    own, others = torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.0, 4.0, 5.0])
    v = ((own.mean() - 0.05 * others.mean()) / 0.95).requires_grad_()
    loss = (v - own).square().mean() - 0.05 * (v - others).square().mean()
    assert torch.autograd.grad(loss, v)[0].abs() < 1e-6
