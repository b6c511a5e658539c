"""Few-step models against closed forms: Gaussian data's flow map, average velocity and consistency function are known."""

import zlib

import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from ldm.backbone.dit import DiT
from ldm.backbone.mlp import MLP
from ldm.backbone.mmdit import MMDiT
from ldm.backbone.unet import UNet
from ldm.denoiser import DataTime, Denoiser
from ldm.guidance.cfg import CFG
from ldm.objective._jacobian import along
from ldm.objective.consistency import Consistency, tangent
from ldm.objective.mean_flow import MeanFlow, mean_velocity
from ldm.objective.regression import Regression
from ldm.objective.shortcut import Shortcut, half_steps
from ldm.objective.time import Uniform
from ldm.prediction import Flow, Noise, Velocity
from ldm.sampler.consistency import Consistency as ConsistencySteps
from ldm.sampler.flow_map import FlowMap
from ldm.schedule import Cosine, Linear
from ldm.types import Cond, Draw, Widths, like, mix

MEAN, STD = 0.3, 0.7
COUNT = 4096
POSITION = torch.arange(COUNT)


class Model:
    """As much of one as these objectives ask for."""

    def __init__(self, denoiser):
        self.denoiser, self.average = denoiser, self


class Exact(nn.Module):
    """The flow of N(MEAN, STD^2), told as a flow map: its place at `to`, or at the data where there is no second time."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction, self.gain = schedule, prediction, nn.Parameter(torch.ones((), dtype=torch.float64))

    def std(self, t):
        alpha, sigma = self.schedule(t)
        return (alpha**2 * STD**2 + sigma**2).sqrt()

    def at(self, x_t, t, to):
        (alpha, _), (alpha_to, _) = self.schedule(t), self.schedule(to)
        return like(alpha_to * MEAN, x_t) + like(self.std(to) / self.std(t), x_t) * (x_t - like(alpha * MEAN, x_t))

    def velocity(self, x_t, t):
        """dx/dt of the flow."""
        return torch.func.jvp(lambda s: self.at(x_t, t, s), (t,), (torch.ones_like(t),))[1]

    def output(self, x_t, t, cond, to=None):
        (_, sigma), (_, there) = self.schedule(t), self.schedule(to)
        return self.gain * (x_t - self.at(x_t, t, to)) / like(sigma - there, x_t)


class ExactConsistency(Exact):
    """The same, told as the velocity on the circle that leads to the data, where sigma is taken to be 0."""

    def output(self, x_t, t, cond, to=None):
        alpha, sigma = (like(s, x_t) for s in self.schedule(t))
        data = MEAN + STD / like(self.std(t), x_t) * (x_t - alpha * MEAN)
        return (alpha * x_t - data) / sigma


def places(schedule, count=64):
    """x_t and times t > to."""
    torch.manual_seed(0)
    t = 0.1 + 0.85 * torch.rand(count, dtype=torch.float64)
    alpha, sigma = (like(s, torch.zeros(count, 1, 1, 1)) for s in schedule(t))
    x = MEAN + STD * torch.randn(count, 1, 2, 2, dtype=torch.float64)
    noise = torch.randn(count, 1, 2, 2, dtype=torch.float64)
    return x, noise, alpha * x + sigma * noise, t, t * torch.rand(count, dtype=torch.float64) * 0.9


@pytest.mark.parametrize("schedule", [Linear(), Linear(shift=3.0)], ids=repr)
def test_the_average_velocity_of_gaussian_data_is_its_own_target(schedule):
    """Along the flow's own velocity, which is the samples' mean: equation 6 holds to rounding."""
    model, (_, _, x_t, t, to) = Exact(schedule, Flow()), places(schedule)
    rate = torch.func.jvp(lambda s: schedule(s)[1], (t,), (torch.ones_like(t),))[1]
    output, target = mean_velocity(model, x_t, t, to, Cond(), model.velocity(x_t, t) / like(rate, x_t))
    torch.testing.assert_close(output, target, atol=1e-9, rtol=1e-9)
    assert output.requires_grad and not target.requires_grad


def test_there_the_gradient_of_mean_flow_vanishes():
    """Within 4 standard errors over samples, of a gradient that is far from 0 at a wrong map."""
    model, (x, noise, x_t, t, to) = Exact(Linear(), Flow()), places(Linear(), COUNT)
    for gain, wanted in ((1.0, True), (1.1, False)):
        model.gain.data.fill_(gain)
        output, target = mean_velocity(model, x_t, t, to, Cond(), noise - x)
        each = ((output - target) * output).flatten(1).mean(1).detach()
        assert (each.mean().abs() < 4 * each.std() / COUNT**0.5) == wanted


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_map_is_drawn_from_in_any_number_of_steps(steps):
    model, noise = Exact(Linear(), Flow()), torch.randn(8, 1, 2, 2, dtype=torch.float64)

    def denoise(x_t, t, to):
        alpha, sigma = model.schedule(t)
        return Flow().to_data(model.output(x_t, t, Cond(), to), x_t, alpha, sigma).detach()

    sampler = FlowMap(steps)
    times = sampler.times(Linear())
    x = torch.hypot(*Linear()(times[0])) * noise
    torch.testing.assert_close(sampler(denoise, Linear(), noise, range(8)), model.at(x, times[0], times[-1]))


@pytest.mark.parametrize("schedule", [Linear(), Linear(shift=3.0)], ids=repr)
def test_of_gaussian_data_two_half_steps_are_the_whole_one(schedule):
    """The exact map is the shortcut's own target; one that is wrong is not."""
    model, (_, _, x_t, t, to) = Exact(schedule, Flow()), places(schedule)
    wanted = model.output(x_t, t, Cond(), to)
    torch.testing.assert_close(half_steps(model, x_t, t, to, Cond(), 0.0), wanted, atol=1e-9, rtol=1e-9)
    model.gain.data.fill_(1.1)
    assert (half_steps(model, x_t, t, to, Cond(), 0.0) - 1.1 * wanted).abs().max() > 1e-2


def test_the_shortest_steps_of_a_shortcut_are_told_as_none():
    seen = []

    class Said:
        schedule = Linear()

        def output(self, x_t, t, cond, to):
            seen.append((t.tolist(), to.tolist()))
            return x_t

    half_steps(Said(), torch.ones(2, 1, 2, 2), torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.0]), Cond(), 0.125)
    assert seen == [([0.5, 1.0], [0.5, 0.5]), ([0.375, 0.5], [0.375, 0.0])]


def test_a_shortcuts_steps_lie_on_grids_of_powers_of_two():
    draw = Draw(0, POSITION, COUNT)
    t, to, two = Shortcut(time=Uniform(), share=0.25, steps=128).times(draw, Linear(), torch.zeros(1, 1, 2, 2))
    long = (t - to)[two]
    assert len(two) == COUNT // 4 and not (t - to)[~torch.isin(POSITION, two)].any()
    assert sorted(long.unique().tolist()) == [2.0**-k for k in range(6, -1, -1)]
    assert not (t[two] / long % 1).any() and t.max() <= 1 and to.min() == 0
    counts = torch.stack([(long == 2.0**-k).float().mean() for k in range(7)])
    assert (counts - 1 / 7).abs().max() < 0.05


def test_a_shortcut_without_steps_is_plain_flow_matching_to_the_bit():
    torch.manual_seed(0)
    net = Denoiser(MLP(1, Widths(vector=8), size=2, width=16), Linear(), Flow(), DataTime(), span=8)
    x, draw = torch.randn(64, 1, 2, 2), Draw(0, torch.arange(64), 64)
    plain = Regression(Uniform())(Model(net), {}, x, Cond(), draw)["loss"]
    assert torch.equal(Shortcut(time=Uniform(), share=0.0)(Model(net), {}, x, Cond(), draw)["loss"], plain)
    assert Shortcut(time=Uniform())(Model(net), {}, x, Cond(), draw)["loss"] != plain


def two_bumps(count, generator):
    side = torch.where(torch.rand(count, generator=generator) < 0.6, -1.0, 1.2)
    return (side + 0.3 * torch.randn(count, generator=generator)).view(count, 1, 1, 1)


def spread(count):
    """Unit normal numbers, one in each of so many equally likely intervals."""
    return torch.special.ndtri((torch.arange(count) + 0.5) / count)


FEW_STEPS = {"mean_flow": MeanFlow(time=Uniform(), share=0.75, power=0.0), "shortcut": Shortcut(time=Uniform(), steps=16)}


@pytest.mark.slow
@pytest.mark.parametrize("objective, steps", [(FEW_STEPS["mean_flow"], 1500), (FEW_STEPS["shortcut"], 3000)], ids=FEW_STEPS)
def test_trained_on_a_mixture_one_step_passes_a_two_sample_test(objective, steps):
    """Kolmogorov-Smirnov with 512 samples of each, evenly over their distributions so that chance adds nothing, below its 0.1 %
    critical value; plain flow's one step is far above. Of a shortcut few samples a step are of the longest step, which therefore
    learns last (0.084 after 1,500 steps, 0.041 after 4,500); sixteen exact steps of Euler would leave 0.028.
    """
    torch.manual_seed(0)
    mlps = [MLP(1, Widths(vector=16), size=1, width=64, depth=2) for _ in range(2)]
    net, average = (Denoiser(mlp, Linear(), Flow(), DataTime(), span=16) for mlp in mlps)
    average.load_state_dict(net.state_dict())
    generator, batch = torch.Generator().manual_seed(1), 512
    model, optimizer = Model(net), torch.optim.Adam(net.parameters())
    model.average = Model(average)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        draw = Quick(step, torch.arange(batch), batch, step)
        loss = objective(model, {}, two_bumps(batch, generator), Cond(), draw)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    count = 512
    noise, one = spread(count).view(count, 1, 1, 1), torch.ones(count)
    with torch.no_grad():
        drawn, plain = (noise - average.output(noise, one, Cond(), to) for to in (0 * one, None))
    real = torch.cat([side + 0.3 * spread(number) for side, number in ((-1.0, 307), (1.2, 205))])
    critical = 1.95 * (2 / count) ** 0.5
    found, control = (ks_2samp(sample.flatten(), real).statistic for sample in (drawn, plain))
    assert found < critical < control / 2, (found, control)


class Quick(Draw):
    """All samples' numbers at once."""

    def normal(self, stream, shape):
        return torch.randn(len(self.position), *shape, generator=self.generator(stream))

    def uniform(self, stream, shape=()):
        return torch.rand(len(self.position), *shape, generator=self.generator(stream))

    def generator(self, stream):
        return torch.Generator().manual_seed(mix(self.seed, zlib.crc32(stream.encode())))


def test_with_one_time_it_is_plain_flow_matching_to_the_bit():
    torch.manual_seed(0)
    net = Denoiser(MLP(1, Widths(vector=8), size=2, width=16), Linear(), Flow(), DataTime(), span=8)
    x, draw = torch.randn(64, 1, 2, 2), Draw(0, torch.arange(64), 64)
    plain = Regression(Uniform())(Model(net), {}, x, Cond(), draw)["loss"]
    said = MeanFlow(time=Uniform(), share=0.0, power=0.0)(Model(net), {}, x, Cond(), draw)
    assert torch.equal(said["loss"], plain) and torch.equal(said["error"], plain)
    t, velocity = torch.rand(64), torch.randn_like(x)
    assert torch.equal(mean_velocity(net, x, t, t, Cond(), velocity)[1], velocity)
    assert torch.equal(net(x, t, Cond()), net(x, t, Cond(), t)) and not torch.equal(net(x, t, Cond()), net(x, t, Cond(), t / 2))


def test_two_times_are_drawn_in_order_for_the_share_that_has_them():
    draw = Draw(0, POSITION, COUNT)
    t, to = MeanFlow(time=Uniform(), share=0.25).times(draw, Linear(), torch.zeros(COUNT, 3, 4, 4))
    assert (to <= t).all() and (to < t).float().mean().item() == pytest.approx(0.25, abs=0.03)


NETS = {
    "unet": lambda: UNet(2, Widths(8, 6), width=8, mult=(1, 2), res_blocks=1, depth=(1, 1), heads=2, groups=4),
    "unet without tokens": lambda: UNet(
        2, Widths(8), width=8, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4, scale_shift=True
    ),
    "dit": lambda: DiT(2, Widths(8), size=4, width=8, depth=2, heads=2, vector=nn.Linear),
    "lightningdit": lambda: DiT(
        2, Widths(8), 4, 1, 16, 2, 2, nn.Linear, rms_norm=True, swiglu=True, rotary=True, norm_heads=True
    ),
    "mmdit": lambda: MMDiT(2, Widths(8, 6), size=4, most=4, width=16, depth=2, heads=2, again=1, norm_heads=True),
    "mlp": lambda: MLP(2, Widths(8, 6), size=4, width=16),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_the_derivative_through_every_backbone_is_the_finite_difference(make, monkeypatch):
    """In float64, to 1e-6 of its size, in x and t at once, with texts of different lengths; and gradients reach the weights."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # waves are float32 otherwise
    torch.manual_seed(0)
    net = make().double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    denoiser = Denoiser(net, Linear(), Flow(), DataTime(), span=8)
    x, direction = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t, to = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    cond = Cond(tokens=torch.randn(3, 5, 6, dtype=torch.float64), mask=mask)
    output, change = along(denoiser, x, t, cond, (direction, torch.ones_like(t)), to)
    with torch.no_grad():
        e = 1e-5
        there, here = (denoiser.output(x + s * direction, t + s, cond, to) for s in (e, -e))
    assert (change - (there - here) / (2 * e)).abs().max() < 1e-6 * change.abs().max()
    torch.testing.assert_close(output, denoiser.output(x, t, cond, to))
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_tangent_of_gaussian_datas_consistency_function_is_zero():
    schedule = Cosine()
    model, (x, noise, x_t, t, _) = ExactConsistency(schedule, Velocity()), places(schedule)
    (_, _), (rate, _) = torch.func.jvp(schedule, (t,), (torch.ones_like(t),))
    marginal = model.velocity(x_t, t) / like(-rate / schedule(t)[1], x_t)  # dx/da
    assert tangent(model, x_t, t, Cond(), marginal, 1.0)[1].abs().max() < 1e-9
    alpha, sigma = (like(s, x) for s in schedule(t))
    single = alpha * noise - sigma * x
    output, g = tangent(model, x_t, t, Cond(), single, 0.0)
    torch.testing.assert_close(g, -(alpha**2) * (output - single))  # at first, flow matching's
    g = tangent(model, *(z.repeat(64, *[1] * (z.ndim - 1)) for z in (x_t, t)), Cond(), single.repeat(64, 1, 1, 1), 1.0)[1]
    assert not g.requires_grad and g.abs().max() > 0.1


def test_a_consistency_function_draws_in_one_step_and_in_two():
    """One step is the flow; of two, the noise is fresh and the distribution is the data's."""
    schedule, noise = Cosine(floor=1e-6), torch.randn(COUNT, 1, 1, 1, dtype=torch.float64)
    model = ExactConsistency(schedule, Velocity())

    def denoise(x_t, t):
        return Velocity().to_data(model.output(x_t, t, Cond()), x_t, *schedule(t)).detach()

    one, two = (ConsistencySteps(steps)(denoise, schedule, noise, range(COUNT)) for steps in (1, 2))
    torch.testing.assert_close(one, MEAN + STD * noise, atol=1e-5, rtol=0)
    assert (one - two).abs().max() > 0.5
    assert two.mean().item() == pytest.approx(MEAN, abs=4 * STD / COUNT**0.5)
    assert two.std().item() == pytest.approx(STD, rel=4 / (2 * COUNT) ** 0.5)


def test_consistency_training_leans_on_the_data_first_and_on_the_network_later():
    torch.manual_seed(0)
    net = Model(Denoiser(MLP(1, Widths(), size=2, width=16), Cosine(), Velocity(), DataTime()))
    x, objective = torch.randn(64, 1, 2, 2), Consistency(time=Uniform(), warmup=10)
    lengths = [objective(net, {}, x, Cond(), Draw(0, torch.arange(64), 64, step))["tangent"] for step in (0, 5, 10, 20)]
    assert lengths[2] == lengths[3] and len({round(length.item(), 6) for length in lengths}) == 3


def test_what_does_not_fit_is_named():
    net, x, draw = MLP(1, Widths(), size=2, width=8), torch.zeros(2, 1, 2, 2), Draw(0, torch.arange(2), 2)
    one_time = Model(Denoiser(net, Linear(), Flow(), DataTime()))
    with pytest.raises(ValueError, match=r"knows one time.*model\.span=64"):
        MeanFlow()(one_time, {}, x, Cond(), draw)
    for schedule, prediction in ((Cosine(), Flow()), (Linear(), Noise())):
        with pytest.raises(ValueError, match=r"schedule=linear prediction=flow; found schedule="):
            MeanFlow()(Model(Denoiser(net, schedule, prediction, DataTime())), {}, x, Cond(), draw)
    with pytest.raises(ValueError, match=r"schedule=cosine prediction=velocity; found schedule=Linear prediction=flow"):
        Consistency()(one_time, {}, x, Cond(), draw)
    for make in (MeanFlow, Shortcut):
        with pytest.raises(ValueError, match=r"objective\.share=2"):
            make(share=2.0)
        with pytest.raises(ValueError, match=r"schedule=linear prediction=flow; found schedule="):
            make()(Model(Denoiser(net, Cosine(), Flow(), DataTime())), {}, x, Cond(), draw)
    with pytest.raises(ValueError, match=r"objective\.steps=12: steps are halved"):
        Shortcut(steps=12)


def test_guidance_tells_both_times():
    class Said:
        def __init__(self):
            self.conditioner, self.seen = None, []

        def condition(self, request, only=None):
            return Cond(vector=torch.zeros(3, 1))

        def denoiser(self, x_t, t, cond, to=None):
            self.seen.append((len(x_t), to))
            return x_t

    model, x = Said(), torch.zeros(3, 1, 2, 2)
    for scale in (1.0, 2.0):
        FlowMap(2)(CFG(scale)(model, {}), Linear(), x, range(3))
    assert [count for count, _ in model.seen] == [3, 3, 6, 6] and [float(to.max()) for _, to in model.seen] == [0.5, 0.0] * 2
