"""Data whose denoiser is exact: what stochastic samplers draw, two samples compared, and likelihood."""

import math
from itertools import pairwise

import pytest
import torch
from omegaconf import OmegaConf

from ldm.build import build
from ldm.compose import CONFIGS
from ldm.sampler.grid import Karras as KarrasGrid
from ldm.sampler.heun import Heun
from ldm.schedule import Cosine, Karras, Linear, ScaledLinear

MEANS, WEIGHTS, STD = (-1.2, 0.8), (0.4, 0.6), 0.3


def gaussian(schedule, mean=0.3, std=0.7):
    """The exact denoiser of N(mean, std^2) data."""

    def denoise(x_t, t, to=None):
        alpha, sigma = schedule(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)

    return denoise


def mixture(schedule):
    """The exact denoiser of the mixture of two normal distributions: each one's answer, by how likely it is."""

    def denoise(x_t, t, to=None):
        answers = torch.stack([gaussian(schedule, mean, STD)(x_t, t) for mean in MEANS])
        odds = torch.stack([math.log(w) + log_normal(schedule, x_t, t, m) for m, w in zip(MEANS, WEIGHTS)])
        return (odds.softmax(0) * answers).sum(0)

    return denoise


def log_normal(schedule, x_t, t, mean, std=STD):
    alpha, sigma = schedule(t)
    variance = alpha**2 * std**2 + sigma**2
    return -((x_t - alpha * mean).square() / variance + torch.log(2 * math.pi * variance)) / 2


SCHEDULES = pytest.mark.parametrize("schedule", [Linear(), Cosine(), Karras(), ScaledLinear()], ids=lambda s: type(s).__name__)
STOCHASTIC = [
    ("ddpm", {}),
    ("ddpm", {"v": 1.0}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5}),
    ("euler_ancestral", {}),
    ("dpmpp_sde", {}),
    ("heun", {"churn": 40.0}),
]


def sampler(name, **settings):
    return build(OmegaConf.to_container(OmegaConf.load(CONFIGS / "sampler" / f"{name}.yaml")) | settings)


@SCHEDULES
@pytest.mark.parametrize("name, settings", STOCHASTIC, ids=str)
def test_stochastic_samplers_have_the_mean_and_variance_of_the_data(name, settings, schedule):
    """Within 4 standard errors of n independent numbers, of which a bias of 500 steps' size takes its part."""
    noise = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    drawn = sampler(name, **settings, steps=500)(gaussian(schedule), schedule, noise, range(4))
    n = drawn.numel()
    assert abs(drawn.mean().item() - 0.3) < 4 * 0.7 / n**0.5
    assert abs(drawn.var().item() / 0.7**2 - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("path", sorted((CONFIGS / "sampler").glob("*.yaml")), ids=lambda p: p.stem)
def test_samples_of_a_mixture_match_the_data(path):
    """Two-sample Kolmogorov-Smirnov: the distance stays below its 0.1 % critical value, 1.95 sqrt(2 / n)."""
    if not sampler(path.stem).order:
        pytest.skip("for consistency models alone")
    n = 4096
    noise = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    drawn = sampler(path.stem, steps=200)(mixture(Cosine()), Cosine(), noise, range(4)).flatten()
    which = (torch.rand(n) < WEIGHTS[1]).long()
    real = torch.tensor(MEANS, dtype=torch.float64)[which] + STD * torch.randn(n, dtype=torch.float64)
    both = torch.cat((drawn, real)).sort().values
    cdfs = [torch.searchsorted(sample.sort().values, both, right=True) / n for sample in (drawn, real)]
    assert (cdfs[0] - cdfs[1]).abs().max() < 1.95 * (2 / n) ** 0.5


def test_ddim_ddpm_and_euler_ancestral_are_one_method():
    """At eta = 1 and v = 0 they take the same steps, up to what the last one adds at the floor."""
    noise, schedule = torch.randn(2, 1, 4, 4, dtype=torch.float64), ScaledLinear(floor=1e-9)
    drawn = [
        sampler(name, steps=20, **settings)(mixture(schedule), schedule, noise, [3, 4])
        for name, settings in (("ddim", {"eta": 1.0}), ("ddpm", {}), ("euler_ancestral", {}))
    ]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-7, rtol=0)
    torch.testing.assert_close(drawn[0], drawn[2], atol=1e-7, rtol=0)


def test_heun_without_churn_is_edms_algorithm_1_and_pictures_differ_by_their_seed():
    noise = torch.randn(1, 1, 4, 4, dtype=torch.float64).expand(2, -1, -1, -1)
    churned = Heun(10, churn=20.0)(mixture(Cosine()), Cosine(), noise, [0, 1])
    assert not torch.allclose(*churned)
    again = Heun(10, churn=20.0)(mixture(Cosine()), Cosine(), noise.flip(0), [1, 0]).flip(0)
    torch.testing.assert_close(churned, again)
    outside = Heun(10, churn=20.0, low=1e9)(mixture(Cosine()), Cosine(), noise, [0, 1])
    torch.testing.assert_close(outside, Heun(10)(mixture(Cosine()), Cosine(), noise, [0, 1]))


def log_likelihood(denoise, schedule, x, times, probe):
    """The probability-flow ODE's likelihood (https://arxiv.org/abs/2011.13456, section 4.3).

    x: (B, C, H, W) latents at times[0], the data; times rising to the noise -> log p(x): (B), in nats.

    With y = x / alpha and r = sigma / alpha the ODE is dy/dr = (y - x_hat) / r, stepped by Heun's method (two calls a step); its
    divergence is the Hutchinson estimate of one probe, (B, C, H, W) of +1 and -1, exact where the Jacobian is diagonal.
    In bits per dimension it is -log p(x) / (C H W log 2).
    """
    alpha, _ = schedule(times[0].double().cpu())
    y, size = x / alpha, x[0].numel()
    gained = -size * torch.log(alpha) * torch.ones(len(x), dtype=x.dtype, device=x.device)
    for t, s in pairwise(times.double().cpu()):
        h = _ratio(schedule, s) - _ratio(schedule, t)
        slope_t, divergence_t = _flow(denoise, schedule, y, t, probe)
        slope_s, divergence_s = _flow(denoise, schedule, y + h * slope_t, s, probe)
        y = y + h * (slope_t + slope_s) / 2
        gained = gained + h * (divergence_t + divergence_s) / 2
    variance = 1 + _ratio(schedule, times[-1].double().cpu()) ** 2  # of y, as samplers start
    return gained - (y.square().flatten(1).sum(1) / variance + size * torch.log(2 * math.pi * variance)) / 2


def _ratio(schedule, t):
    alpha, sigma = schedule(t)
    return sigma / alpha


def _flow(denoise, schedule, y, t, probe):
    """y: (B, C, H, W) -> dy/dr: (B, C, H, W), and its divergence: (B)."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        slope = (y - denoise(schedule(t)[0] * y, t)) / _ratio(schedule, t)
        (grad,) = torch.autograd.grad((slope * probe).sum(), y)
    return slope.detach(), (grad * probe).flatten(1).sum(1)


@SCHEDULES
def test_likelihood_of_the_probability_flow(schedule):
    """To 1e-2 bits per dimension of the exact density, at points in the middle and in the tails."""
    t = torch.tensor(0.0, dtype=torch.float64)
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(16, 1, 2, 2)
    parts = [math.log(w) + log_normal(schedule, x, t, m) for m, w in zip(MEANS, WEIGHTS)]
    exact = torch.stack(parts).logsumexp(0).flatten(1).sum(1)
    times = KarrasGrid()(400, schedule).flip(0)
    found = log_likelihood(mixture(schedule), schedule, x, times, torch.ones_like(x))
    assert ((found - exact) / 4 / math.log(2)).abs().max() < 1e-2
