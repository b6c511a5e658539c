"""What is trained: weights, noises, distances and times against closed forms, for every prediction."""

import math
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.backbone.dit import DiT
from ldm.build import build
from ldm.check import check_nodes, parameters_of
from ldm.compose import CONFIGS, compose_config
from ldm.denoiser import DataTime, Denoiser, LogRatio
from ldm.errors import Refusal
from ldm.objective.distance import Huber, Square
from ldm.objective.noise import Normal, Offset
from ldm.objective.regression import Regression
from ldm.objective.time import BySize, LogitNormal, LogNormal, Uniform
from ldm.objective.uncertainty import Uncertainty
from ldm.objective.weight import EDM, MinSNR, Plain, SoftMinSNR
from ldm.prediction import Data, Flow, Noise, Velocity
from ldm.sampler.grid import BySize as Grid
from ldm.schedule import Cosine, Karras, Linear, ScaledLinear
from ldm.types import Cond, Draw, Widths, like

PREDICTIONS = [Data(), Noise(), Flow(), Velocity()]
SCHEDULES = [Linear(), Cosine(), Karras(), ScaledLinear()]
POSITION = torch.arange(64)
DRAW = Draw(0, POSITION, 64)
X = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


class Echo(nn.Module):
    """Says half of what it hears."""

    def forward(self, x, noise_level, cond):
        return x / 2


def denoiser(schedule, prediction):
    return Denoiser(Echo(), schedule, prediction, LogRatio())


def model(denoiser):
    """As much of one as these objectives ask for."""
    return SimpleNamespace(denoiser=denoiser)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
@pytest.mark.parametrize("weight", [MinSNR(), SoftMinSNR(), EDM()], ids=repr)
def test_a_weight_is_of_the_datas_error_whatever_is_predicted(weight, prediction, schedule):
    """The loss is w ||x_hat - x||^2 with w = min(SNR, 5), SNR 4 / (SNR + 4), SNR + 1."""
    net, t = denoiser(schedule, prediction), 0.02 + 0.96 * DRAW.stratified("time").double()
    alpha, sigma = (like(s, X) for s in schedule(t))
    x_hat = net(alpha * X + sigma * DRAW.normal("noise", X.shape[1:]).double(), t, Cond())
    snr = (alpha / sigma).flatten() ** 2
    w = {MinSNR: snr.clamp(max=5), SoftMinSNR: snr * 4 / (snr + 4), EDM: snr + 1}[type(weight)]
    each, log_ratio = Regression(lambda u, s: 0.02 + 0.96 * u.double(), weight).each(net, X, Cond(), DRAW)
    torch.testing.assert_close(each, w * (x_hat - X).square().flatten(1).mean(1))
    torch.testing.assert_close(log_ratio, -snr.log() / 2)


def test_min_snr_is_the_papers_factor_for_noise_and_velocity():
    """min(SNR, 5) / SNR for noise, / (SNR + 1) for velocity (sections 3.4 and 4 of https://arxiv.org/abs/2303.09556)."""
    alpha, sigma = Cosine()(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    snr, one = (alpha / sigma) ** 2, torch.ones_like(alpha)
    for prediction, divisor in ((Noise(), snr), (Velocity(), snr + 1), (Data(), one)):
        gain = prediction.to_data(one, 0 * one, alpha, sigma).abs()
        torch.testing.assert_close(MinSNR()(alpha, sigma, gain), snr.clamp(max=5) / divisor)


def test_edms_weight_of_velocity_is_plain():
    net = denoiser(Karras(), Velocity())
    plain, edm = (Regression(Uniform(), weight).each(net, X, Cond(), DRAW)[0] for weight in (Plain(), EDM()))
    torch.testing.assert_close(plain, edm)


def test_offset_noise_moves_whole_channels():
    """Each pixel has variance 1 + 0.1^2, and two of one channel covariance 0.1^2."""
    draw, x = Draw(0, torch.arange(4096), 4096), torch.zeros(4096, 2, 2, 2)
    noise = Offset(0.5)(draw, x)
    a, b, other = noise[:, 0, 0, 0], noise[:, 0, 1, 1], noise[:, 1, 0, 0]
    se = 1.25 / 4096**0.5
    assert (a * a).mean().item() == pytest.approx(1.25, abs=6 * se) and (a * b).mean().item() == pytest.approx(0.25, abs=4 * se)
    assert (a * other).mean().item() == pytest.approx(0, abs=4 * se)
    assert torch.equal(Offset(0.0)(draw, x), Normal()(draw, x))


def test_huber_is_the_square_when_small_and_straight_when_large():
    error = torch.tensor([0.0, 1e-4, -1e-4, 100.0, -100.0], dtype=torch.float64)
    assert Huber(0.1)(error)[:3].tolist() == pytest.approx(Square()(error)[:3].tolist(), rel=1e-5)
    assert Huber(0.1)(error)[3:].tolist() == pytest.approx([2 * 0.1 * (100 - 0.1)] * 2, rel=1e-5)


def test_times_have_the_distribution_they_say():
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    assert torch.equal(Uniform()(u, Cosine()), u)
    logit = LogitNormal(0.4, 0.7)(u, Cosine()).logit()
    assert logit.mean().item() == pytest.approx(0.4, abs=1e-3) and logit.std().item() == pytest.approx(0.7, rel=1e-3)
    for schedule in (Karras(1e-4, 1e4), Linear(1e-6), Cosine(1e-6)):
        alpha, sigma = schedule(LogNormal(-0.5, 1.2)(u, schedule))
        log_ratio = (sigma / alpha).log()
        assert log_ratio.mean().item() == pytest.approx(-0.5, abs=1e-3) and log_ratio.std().item() == pytest.approx(1.2, rel=1e-3)


def test_uncertainty_begins_plain_and_is_best_at_the_log_of_the_loss():
    """Then the loss is 1 + E log(regression), and no gradient is left."""
    net, plain = denoiser(Linear(), Flow()), Regression(Uniform())
    uncertain = Uncertainty(time=Uniform()).double()
    each, _ = plain.each(net, X, Cond(), DRAW)
    said = uncertain(model(net), {}, X, Cond(), DRAW)
    torch.testing.assert_close(said["loss"], each.mean())
    torch.testing.assert_close(said["regression"], each.mean())
    u = each.log().requires_grad_()
    uncertain.u = lambda log_ratio: u
    best = uncertain(model(net), {}, X, Cond(), DRAW)["loss"]
    assert best.item() == pytest.approx(1 + each.log().mean().item())
    assert torch.autograd.grad(best, u)[0].abs().max() < 1e-12


def test_uncertainty_learns_the_level_of_the_loss():
    net, uncertain = denoiser(Linear(), Flow()), Uncertainty(time=Uniform()).double()
    optimizer = torch.optim.LBFGS(uncertain.head.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = uncertain(model(net), {}, X, Cond(), DRAW)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    each, log_ratio = uncertain.each(net, X, Cond(), DRAW)
    assert (uncertain.u(log_ratio) - each.log()).abs().mean() < 0.2


ACROSS = ("contrastive",)  # whose samples see the whole batch
SMALL = {  # what an objective must be told, to be tried on the network of `listener`
    "route": ["objective.first=1", "objective.last=1"],
    "align": ["objective.width=8", "objective.layer=1", "objective.hidden=8"],
}


def listener(schedule, prediction):
    """A model as small as can be that has blocks."""
    net = DiT(3, Widths(vector=8), size=4, patch=2, width=8, depth=2, heads=2)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    listening = model(Denoiser(net, schedule, prediction, DataTime(), span=8))
    listening.average = listening
    return listening


def told(name, clip_folder, runs):
    (runs / "quickstart").mkdir()
    (runs / "quickstart" / "clip").symlink_to(clip_folder)
    return compose_config("train", [f"objective={name}", f"runs={runs}", *SMALL[name]]).objective


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (CONFIGS / "objective").glob("*.yaml") if "model.init" not in p.read_text())
)
def test_every_objective_is_a_scalar_and_the_same_in_parts(name, clip_folder, tmp_path):
    """Halves of a global batch, each on its own device, have the mean of their losses."""
    plain = OmegaConf.load(CONFIGS / "objective" / f"{name}.yaml")
    objective = build(told(name, clip_folder, tmp_path) if name in SMALL else plain)
    net = listener(*((Cosine(), Velocity()) if name == "consistency" else (Linear(), Flow())))
    batch = {name: X.float().repeat_interleave(2, 2).repeat_interleave(2, 3) for name in ("image", "mask")}
    whole = objective(net, batch, X.float(), Cond(), DRAW)
    assert all(value.shape == () and value.isfinite() for value in whole.values())
    if name in ACROSS:  # test_batch.py has these
        return
    halves = [
        objective(net, {k: v[r] for k, v in batch.items()}, X[r].float(), Cond(), Draw(0, POSITION[r], 64))["loss"]
        for r in POSITION.split(32)
    ]
    torch.testing.assert_close(whole["loss"], sum(halves) / 2)


BEFORE = {  # of flow and velocity, in float64, as they were when objectives were given the denoiser alone
    "plain": (lambda: Regression(), 2.2417580427577386, 1.226076358469606),
    "parts": (lambda: Regression(LogNormal(), MinSNR(), Offset(), Huber()), 0.05004235212072003, 0.05955954000732361),
    "uncertain": (lambda: Uncertainty(time=Uniform()).double(), 2.242855604373268, 1.2197556055125274),
}


@pytest.mark.parametrize("make, flow, velocity", BEFORE.values(), ids=BEFORE)
def test_losses_stay_what_they_were(make, flow, velocity):
    for prediction, wanted in ((Flow(), flow), (Velocity(), velocity)):
        draw = Draw(3, torch.arange(64) + 7, 64)
        loss = make()(model(denoiser(Cosine(), prediction)), {}, X, Cond(), draw)["loss"]
        assert loss.item() == pytest.approx(wanted, rel=1e-7)  # draws are in float32


def test_parts_are_chosen_by_name_and_unknown_ones_refused():
    chosen = ["objective/weight=min_snr", "objective/noise=offset", "objective/time=log_normal", "objective/distance=huber"]
    parts = build(compose_config("train", ["objective=uncertainty", *chosen, "objective.weight.gamma=3"]).objective)
    assert (parts.weight, parts.noise, parts.time, parts.distance) == (MinSNR(3), Offset(), LogNormal(), Huber())
    with pytest.raises(ValueError, match="objective/weight=max_snr"):
        compose_config("train", ["objective/weight=max_snr"])


@pytest.mark.parametrize("target", ["region.Region", "dmd.DMD", "align.Align"])
def test_inherited_parts_are_settings_and_nothing_else_is(target):
    names, open_ended = parameters_of(f"ldm.objective.{target}")
    assert {"time", "weight", "noise", "distance"} < set(names) and not open_ended
    with pytest.raises(Refusal, match="Did you mean `noise`"):
        check_nodes({"_target_": f"ldm.objective.{target}", "nois": 1}, ["ldm"])


@pytest.mark.parametrize("path", sorted((CONFIGS / "objective").glob("*/*.yaml")), ids=lambda p: f"{p.parent.stem}={p.stem}")
def test_the_config_of_a_part_says_its_defaults(path):
    part = build(OmegaConf.load(path))
    assert part == type(part)() and type(part).__module__ == f"ldm.objective.{path.parent.stem}"


@pytest.mark.parametrize(("side", "shift"), [(32, 1.0), (128, 3.0), (80, 3.0**0.35)])
def test_larger_pictures_are_trained_at_more_noise(side, shift):
    """As a straight path whose sigma / alpha is `shift` times as large, and as the sampler's grid of the same numbers walks."""
    u, path = torch.linspace(0.01, 0.99, 9, dtype=torch.float64), Linear(floor=0.0)
    by_size = BySize(low=0.0, high=math.log(3))
    objective = Regression(time=by_size)
    t = objective.time_for(torch.zeros(1, 16, side, side))(u, path)
    plain = LogitNormal()(u, path)
    torch.testing.assert_close(t / (1 - t), shift * plain / (1 - plain))
    grid = Grid(low=0.0, high=math.log(3)).sized(side, side)
    torch.testing.assert_close(torch.tensor(grid.shift), torch.tensor(shift))
    assert torch.equal(by_size(u, path), by_size.sized(128, 128)(u, path)), "where no size is said"
