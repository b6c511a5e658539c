"""What every sampler in configs/sampler promises, beside the order that test_math measures."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.build import build
from ldm.command_line import CONFIGS
from ldm.sampler.grid import Karras as KarrasGrid
from ldm.sampler.grid import Leading, Linspace, Listed, Trailing, Uniform
from ldm.schedule import Cosine, Karras, Linear, ScaledLinear

SAMPLERS = sorted((CONFIGS / "sampler").glob("*.yaml"))
every_sampler = pytest.mark.parametrize("config", SAMPLERS, ids=lambda p: p.stem)
every_schedule = pytest.mark.parametrize("schedule", [Linear(), Cosine(), Karras(), ScaledLinear()], ids=repr)


def sampler(config, steps, **settings):
    return build(OmegaConf.to_container(OmegaConf.load(config)) | {"steps": steps} | settings)


def stochastic(draw):
    """Whether the seeds alone change what is drawn."""
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return not torch.equal(*(draw(lambda x_t, t: x_t / 2, Linear(), noise, [seed]) for seed in (0, 1)))


@every_sampler
@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_data_that_is_one_point_is_reached_exactly(config, schedule, steps):
    """The flow's paths are straight in sigma / alpha then: x = alpha * point + sigma * noise in any number of steps."""
    noise, point = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    start, end = (schedule(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0))
    slope = (torch.hypot(*start) * noise - start[0] * point) / start[1]
    wanted = end[0] * point + end[1] * slope
    drawn = sampler(config, steps)(lambda x_t, t: point, schedule, noise, range(4))
    if stochastic(sampler(config, 2)):  # fresh noise in the end, of the last time's size
        assert (drawn - end[0] * point).abs().max() < 6 * end[1]
        return
    torch.testing.assert_close(drawn, wanted, atol=1e-6, rtol=1e-6)


@every_sampler
def test_a_picture_does_not_see_its_batch(config):
    """Nor its place in it: only its own noise and seed."""
    noise, schedule, draw = torch.randn(6, 2, 3, 3), Cosine(), sampler(config, 5)

    def denoise(x_t, t):
        return torch.sin(2 * x_t)

    whole = draw(denoise, schedule, noise, range(6))
    turned = draw(denoise, schedule, noise.flip(0), range(5, -1, -1)).flip(0)
    parts = torch.cat([draw(denoise, schedule, noise[i : i + 1], [i]) for i in range(6)])
    torch.testing.assert_close(whole, turned, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-6)


@every_sampler
def test_there_and_back_again(config):
    """A walk from data to noise and back returns, the closer the more steps: inversion. Stochastic samplers may not."""
    if stochastic(sampler(config, 2)):
        pytest.skip("stochastic")
    schedule, x = Cosine(), torch.randn(4, 1, 2, 2, dtype=torch.float64)

    def denoise(x_t, t):
        alpha, sigma = schedule(t)
        return alpha * 0.5 / (alpha**2 * 0.5 + sigma**2) * x_t

    errors = []
    for steps in (128, 256):
        draw = sampler(config, steps)
        times = draw.times(schedule)
        noise = draw.walk(denoise, schedule, x, times.flip(0), range(4))
        errors.append((draw.walk(denoise, schedule, noise, times, range(4)) - x).abs().max().item())
    assert errors[1] < 0.05 and errors[0] / errors[1] > 1.5


@every_sampler
def test_the_grid_owns_first_and_last(config):
    asked = []

    def denoise(x_t, t):
        asked.append(t.item())
        return x_t

    plain = OmegaConf.to_container(OmegaConf.load(config)) | {"steps": 4}
    plain["grid"] = {"_target_": "ldm.sampler.grid.Uniform", "first": 0.75, "last": 0.25}
    build(plain)(denoise, Linear(), torch.randn(1, 1, 1, 1, dtype=torch.float64), [0])
    assert max(asked) == 0.75 and min(asked) >= 0.25 and asked == sorted(asked, reverse=True)


def test_shift_is_sd3s():
    """Equation 23 of https://arxiv.org/abs/2403.03206: on straight paths it multiplies sigma / alpha by the shift."""
    t, shifted = Uniform(0.9, 0.1)(10, Linear()), Uniform(0.9, 0.1, shift=3.0)(10, Linear())
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t))
    ends = Uniform(shift=3.0)(10, Linear())
    assert ends[0] == 1 and ends[-1] == 0 and (ends.diff() < 0).all()


@every_schedule
def test_grids_fall_from_first_to_last_in_steps_plus_one(schedule):
    for config in sorted((CONFIGS / "sampler" / "grid").glob("*.yaml")):
        for steps in (1, 2, 10):
            times = build(OmegaConf.load(config))(steps, schedule)
            assert times.dtype == torch.float64 and (times.diff() < 0).all() and 0 <= times[-1] and times[0] <= 1
            assert len(times) == steps + 1 or config.stem == "listed"


def test_the_karras_grid_is_edms():
    """Equation 5 of https://arxiv.org/abs/2206.00364 on its own schedule, and then the data."""
    sigma = Karras()(KarrasGrid(lowest=0.0, last=0.0)(18, Karras()))[1]
    i = torch.arange(18, dtype=torch.float64)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma[:-1], wanted)


def test_grids_of_steps_refuse_more_than_there_are():
    for grid in (Leading(), Trailing(), Linspace()):
        with pytest.raises(ValueError, match=r"sampler\.steps=2000.*sampler/grid=uniform"):
            grid(2000, ScaledLinear())
    with pytest.raises(ValueError, match=r"sampler\.grid\.times.*falling"):
        Listed([0.0, 1.0])
