"""What every sampler in configs/sampler promises, beside the order that test_math measures."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ldm.autoencoder.identity import Identity
from ldm.build import build
from ldm.compose import CONFIGS
from ldm.drawing.generate import draw_all, generate
from ldm.guidance.none import Unguided
from ldm.sampler.ddim import DDIM
from ldm.sampler.ddpm import DDPM
from ldm.sampler.euler_ancestral import EulerAncestral
from ldm.sampler.grid import Karras as KarrasGrid
from ldm.sampler.grid import Leading, Linspace, Listed, Trailing, Uniform
from ldm.sampler.heun import Heun
from ldm.sampler.unipc import UniPC
from ldm.schedule import DDPM as DDPMTable
from ldm.schedule import Cosine, Karras, Linear, ScaledLinear

SAMPLERS = sorted((CONFIGS / "sampler").glob("*.yaml"))
every_sampler = pytest.mark.parametrize("config", SAMPLERS, ids=lambda p: p.stem)
every_schedule = pytest.mark.parametrize("schedule", [Linear(), Cosine(), Karras(), ScaledLinear()], ids=repr)


def sampler(config, steps, **settings):
    return build(OmegaConf.to_container(OmegaConf.load(config)) | {"steps": steps} | settings)


def stochastic(draw):
    """Whether the seeds alone change what is drawn."""
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return not torch.equal(*(draw(lambda x_t, t, *to: x_t / 2, Linear(), noise, [seed]) for seed in (0, 1)))


@every_sampler
@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_data_that_is_one_point_is_reached_exactly(config, schedule, steps):
    """The flow's paths are straight in sigma / alpha then: x = alpha * point + sigma * noise in any number of steps."""
    noise, point = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    start, end = (schedule(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0))
    slope = (torch.hypot(*start) * noise - start[0] * point) / start[1]
    wanted = end[0] * point + end[1] * slope
    drawn = sampler(config, steps)(lambda x_t, t, *to: point, schedule, noise, range(4))
    if stochastic(sampler(config, 2)):  # fresh noise in the end, of the last time's size
        assert (drawn - end[0] * point).abs().max() < 6 * end[1]
        return
    torch.testing.assert_close(drawn, wanted, atol=1e-6, rtol=1e-6)


@every_sampler
def test_a_picture_does_not_see_its_batch(config):
    """Nor its place in it: only its own noise and seed."""
    noise, schedule, draw = torch.randn(6, 2, 3, 3), Cosine(), sampler(config, 5)

    def denoise(x_t, t, to=None):
        return torch.sin(2 * x_t)

    whole = draw(denoise, schedule, noise, range(6))
    turned = draw(denoise, schedule, noise.flip(0), range(5, -1, -1)).flip(0)
    parts = torch.cat([draw(denoise, schedule, noise[i : i + 1], [i]) for i in range(6)])
    torch.testing.assert_close(whole, turned, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-6)


@every_sampler
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.3)], ids=str)
def test_few_bits_are_enough_where_hardly_any_signal_is_left(config, dtype, most):
    """Nothing of the size sigma / alpha, 4096 and more here, is added and taken away again."""
    schedule = DDPMTable(zero_terminal_snr=True)

    def denoise(x_t, t, to=None):
        alpha, sigma = schedule(t)
        return alpha * 0.5 / (alpha**2 * 0.5 + sigma**2) * x_t

    noise, draw = torch.randn(8, 1, 3, 5, generator=torch.Generator().manual_seed(0)), sampler(config, 4)
    wanted = draw(denoise, schedule, noise.double(), range(8))
    drawn = draw(denoise, schedule, noise.to(dtype), range(8))
    assert drawn.dtype == dtype and (drawn.double() - wanted).abs().max() < most


@every_sampler
def test_no_step_is_refused(config):
    for grid in sorted((CONFIGS / "sampler" / "grid").glob("*.yaml")):
        if grid.stem != "listed":
            with pytest.raises(ValueError, match=r"sampler\.steps=0: at least one"):
                sampler(config, 0, grid=OmegaConf.to_container(OmegaConf.load(grid))).times(Linear())


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"sampler\.eta=2: .* between 0"):
        DDIM(eta=2)
    with pytest.raises(ValueError, match=r"sampler\.v=2: .* between 0"):
        DDPM(v=2)
    with pytest.raises(ValueError, match=r"sampler\.eta=-1: at least 0"):
        EulerAncestral(eta=-1)
    with pytest.raises(ValueError, match=r"sampler\.churn=-1: at least 0"):
        Heun(churn=-1)
    with pytest.raises(ValueError, match=r"sampler\.p=0: at least 1"):
        UniPC(p=0)


def test_churn_is_as_large_in_a_part_of_the_walk():
    """As in image-to-image, and in inpainting step by step."""
    draw, noise, schedule = Heun(4, churn=0.4), torch.randn(64, 1, 1, 1, dtype=torch.float64), Karras()
    times, seen = draw.times(schedule), []
    for part in (times, times[:2]):
        asked = []
        draw.walk(lambda x_t, t, asked=asked: asked.append(t) or x_t / 2, schedule, noise, part * 0.9, range(64))
        seen.append(asked[0])
    assert seen[0] == seen[1] > 0.9


@every_sampler
def test_there_and_back_again(config):
    """A walk from data to noise and back returns, the closer the more steps: inversion. Stochastic samplers may not."""
    if stochastic(sampler(config, 2)):
        pytest.skip("stochastic")
    schedule, x = Cosine(), torch.randn(4, 1, 2, 2, dtype=torch.float64)

    def denoise(x_t, t, to=None):
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

    def denoise(x_t, t, to=None):
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


# ---- watching


class Own:
    """A user's sampler that owns all it does."""

    def __call__(self, denoise, schedule, noise, seeds):
        x = noise
        for t in (1.0, 0.5, 0.5, 0.75, 0.25):
            x = denoise(x, torch.tensor(t))
        return x


def model_of_half():
    """Its estimate is half of what it sees; pictures are latents."""

    def denoiser(x_t, t, cond, to=None):
        return x_t / 2

    denoiser.schedule, denoiser.parameters = Linear(), lambda: iter([torch.zeros(1)])
    conditioner = SimpleNamespace(fill=lambda ask: ask, hole=None)
    return SimpleNamespace(denoiser=denoiser, conditioner=conditioner, autoencoder=Identity(), condition=lambda request: None)


@pytest.mark.parametrize("config", [*SAMPLERS, None], ids=lambda p: p.stem if p else "own")
def test_each_step_is_told_once_and_changes_nothing(config):
    draw, model, seen = Own() if config is None else sampler(config, 4), model_of_half(), []
    asked = (model, {}, draw, Unguided(), [3, 4], (2, 2))
    drawn = generate(*asked, watch=lambda step, t, x_hat: seen.append((step, t, x_hat)))
    assert torch.equal(drawn, generate(*asked)) and drawn.shape == (2, 3, 2, 2)
    steps, times, estimates = zip(*seen)
    wanted = [1.0, 0.5, 0.25] if config is None else draw.times(Linear())[:-1].tolist()
    assert steps == tuple(range(1, len(wanted) + 1)) and times == pytest.approx(wanted)
    assert all(x_hat.shape == (2, 3, 2, 2) for x_hat in estimates)
    twice = []
    draw_all(model, {}, draw, Unguided(), [3, 4], (2, 2), 1, watch=lambda step, t, x_hat: twice.append(step))
    assert twice == [*steps, *steps]


def test_what_a_watcher_raises_stops_the_drawing():
    def stop(step, t, x_hat):
        raise InterruptedError(f"at step {step}")

    with pytest.raises(InterruptedError, match="at step 1"):
        generate(model_of_half(), {}, DDIM(4), Unguided(), [0], (2, 2), watch=stop)
