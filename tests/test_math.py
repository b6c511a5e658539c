"""Schedules, predictions, the denoiser and the samplers against closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm.compose import CONFIGS
from ldm.denoiser import Denoiser, LogRatio, Timestep
from ldm.prediction import Data, Flow, Noise, Velocity
from ldm.sampler.ddim import DDIM
from ldm.sampler.heun import Heun
from ldm.schedule import DDPM, Cosine, Karras, Linear, ScaledLinear
from ldm.types import Cond, like

SCHEDULES = [
    Linear(),
    Linear(shift=3.0),
    Cosine(),
    Cosine(shift=4.0),
    Karras(),
    ScaledLinear(),
    ScaledLinear(zero_terminal_snr=True),
    DDPM(),
    DDPM(zero_terminal_snr=True),
]
PREDICTIONS = [Data(), Noise(), Flow(), Velocity()]
MEAN, STD = 0.3, 0.7


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_inverse_of_a_schedule(schedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(schedule.inverse((sigma / alpha).log()), t, atol=1e-9, rtol=0)
    assert (torch.diff(sigma / alpha) > 0).all()


def test_a_shift_multiplies_the_ratio_everywhere():
    """SD3's equation 23 on straight paths; log-SNR moves by -2 log(shift) on the cosine, as in simple diffusion."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for plain, shifted in ((Linear(), Linear(shift=3.0)), (Cosine(), Cosine(shift=3.0))):
        (alpha, sigma), (alpha_s, sigma_s) = plain(t), shifted(t)
        torch.testing.assert_close((sigma_s / alpha_s).log(), (sigma / alpha).log() + np.log(3))
    torch.testing.assert_close(Linear(0.0, shift=3.0)(t)[1], 3 * t / (1 + 2 * t))
    torch.testing.assert_close(Cosine(shift=3.0)(t)[0] ** 2 + Cosine(shift=3.0)(t)[1] ** 2, torch.ones_like(t))


@pytest.mark.parametrize("schedule", [ScaledLinear, DDPM])
def test_zero_terminal_snr_and_noise_are_refused_by_name(schedule):
    wanted = rf"prediction=noise with zero terminal SNR .schedule={schedule.__name__}.*prediction=velocity.*zero_terminal_snr"
    with pytest.raises(ValueError, match=wanted):
        Denoiser(Network(), schedule(zero_terminal_snr=True), Noise(), LogRatio())


def test_any_other_schedule_goes_with_any_prediction():
    for schedule in SCHEDULES:
        for prediction in PREDICTIONS:
            if not (getattr(schedule, "zero_terminal_snr", False) and isinstance(prediction, Noise)):
                Denoiser(Network(), schedule, prediction, LogRatio())


@pytest.mark.parametrize("schedule", [Cosine(), ScaledLinear(), DDPM()], ids=repr)
def test_variance_is_preserved(schedule):
    alpha, sigma = schedule(torch.linspace(0, 1, 100, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(100, dtype=torch.float64))


def test_scaled_linear_is_stable_diffusions_table():
    """alpha_bar at step n is the product of 1 - beta over the first n + 1 steps, and t = (n + 1) / 1000."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = torch.from_numpy(np.cumprod(1 - betas))
    alpha, sigma = ScaledLinear()((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    torch.testing.assert_close(alpha**2, alpha_bar, atol=1e-9, rtol=0)
    torch.testing.assert_close(sigma**2, 1 - alpha_bar, atol=1e-9, rtol=0)
    assert alpha_bar[-1].item() == pytest.approx(0.0047, abs=1e-4)


def test_the_network_is_told_the_step():
    t = (torch.arange(1000) + 1) / 1000
    torch.testing.assert_close(Timestep(1000)(t, t, t), torch.arange(1000.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_to_data_undoes_target(prediction, schedule):
    x, noise = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = (like(s, x) for s in schedule(torch.rand(64, dtype=torch.float64)))
    target = prediction.target(x, noise, alpha, sigma)
    torch.testing.assert_close(prediction.to_data(target, alpha * x + sigma * noise, alpha, sigma), x)


def test_velocity_is_edm_preconditioning():
    """Table 1 of https://arxiv.org/abs/2206.00364 with sigma_data = 1."""
    x_t, output = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = (like(s, x_t) for s in Karras()(torch.rand(64, dtype=torch.float64)))
    edm = x_t / (sigma**2 + 1) + sigma / (sigma**2 + 1).sqrt() * -output
    torch.testing.assert_close(Velocity().to_data(output, x_t, alpha, sigma), edm)


class Network(nn.Module):
    """A fixed nonlinear function of the picture and the noise level."""

    def forward(self, x, noise_level, cond):
        return torch.sin(3 * x) + like(noise_level, x) / 100


def exploding(t):
    """Cosine with the signal held at one."""
    alpha, sigma = Cosine()(t)
    return torch.ones_like(t), sigma / alpha


def test_a_trained_network_keeps_its_meaning_under_another_schedule():
    x_t, t = torch.randn(5, 1, 2, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64) * 0.9
    alpha = Cosine()(t)[0].view(-1, 1, 1, 1)
    a = Denoiser(Network(), Cosine(), Velocity(), LogRatio())(x_t, t, Cond())
    b = Denoiser(Network(), exploding, Velocity(), LogRatio())(x_t / alpha, t, Cond())
    torch.testing.assert_close(a, b)


def test_maps_join_the_noisy_latents_channels():
    seen = {}

    class Listening(nn.Module):
        def forward(self, x, noise_level, cond):
            seen["x"] = x
            return x[:, :4]

    x, maps = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3)
    Denoiser(Listening(), Linear(), Flow(), LogRatio())(x, torch.tensor(0.5), Cond(spatial=maps))
    assert torch.equal(seen["x"][:, 4:], maps)


def gaussian(schedule):
    """The exact denoiser of N(MEAN, STD^2) data."""

    def denoise(x_t, t, to=None):
        alpha, sigma = schedule(t)
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)

    return denoise


def error(sampler, schedule, first_seed=0):
    """Largest distance between the sampler's answer and the exact solution of the flow."""
    noise = torch.randn(256, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, zero = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    (alpha_1, sigma_1), (alpha_0, sigma_0) = schedule(one), schedule(zero)

    def std(a, s):
        return (a**2 * STD**2 + s**2).sqrt()

    begun = torch.hypot(alpha_1, sigma_1) * noise
    exact = alpha_0 * MEAN + std(alpha_0, sigma_0) / std(alpha_1, sigma_1) * (begun - alpha_1 * MEAN)
    return (sampler(gaussian(schedule), schedule, noise, range(first_seed, first_seed + 256)) - exact).abs().max().item()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Karras()], ids=repr)
@pytest.mark.parametrize("config", sorted((CONFIGS / "sampler").glob("*.yaml")), ids=lambda p: p.stem)
def test_order_of_convergence(config, schedule):
    """Twice the steps, 2^order less error."""
    from omegaconf import OmegaConf

    from ldm.build import build

    plain = OmegaConf.to_container(OmegaConf.load(config))
    coarse, fine = (build(plain | {"steps": n}) for n in (256, 512))
    if error(coarse, schedule) != error(coarse, schedule, first_seed=256):
        pytest.skip("stochastic")
    assert error(coarse, schedule) / error(fine, schedule) == pytest.approx(2**fine.order, rel=0.35)


@pytest.mark.parametrize("sampler", [DDIM(8), Heun(8)], ids=repr)
def test_a_walk_in_two_legs_is_one_walk(sampler):
    schedule, x = Cosine(), torch.randn(4, 1, 2, 2, dtype=torch.float64)
    times = sampler.times(schedule)
    whole = sampler.walk(gaussian(schedule), schedule, x, times, range(4))
    half = sampler.walk(gaussian(schedule), schedule, x, times[:5], range(4))
    torch.testing.assert_close(sampler.walk(gaussian(schedule), schedule, half, times[4:], range(4)), whole)
