"""Schedules and samplers against diffusers' schedulers: the same random network, noise and grid, 10 steps.

Exceptions, by name: diffusers' DDIM takes 1000 // steps for the distance to the next step, which is wrong on its linspace
grid; its Heun's method steps in sigma / alpha, ours along the schedule's path, so that they meet where that is the path; its
tables are float32, so that outputs which it divides by a small alpha are compared where they stay moderate.
"""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from ldm.denoiser import Denoiser, Timestep
from ldm.prediction import Data, Flow, Noise, Velocity
from ldm.sampler._noise import Streams
from ldm.sampler.consistency import Consistency
from ldm.sampler.ddim import DDIM
from ldm.sampler.ddpm import DDPM as Ancestral
from ldm.sampler.dpmpp import DPMpp
from ldm.sampler.dpmpp_sde import DPMppSDE
from ldm.sampler.euler import Euler
from ldm.sampler.euler_ancestral import EulerAncestral
from ldm.sampler.grid import BySize, Distilled, Karras, Leading, Linspace, Listed, Shifted, Trailing
from ldm.sampler.heun import Heun
from ldm.sampler.unipc import UniPC
from ldm.schedule import DDPM, Linear, ScaledLinear
from ldm.types import Cond, like

STEPS = 10
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = ScaledLinear(floor=1e-7)
PREDICTIONS = {"epsilon": Noise(), "v_prediction": Velocity(), "sample": Data()}
GRIDS = {
    "leading": (Leading(), {"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing": (Trailing(), {"timestep_spacing": "trailing"}),
    "linspace": (Linspace(), {"timestep_spacing": "linspace"}),
}
TURBO = {"timestep_spacing": "trailing", "steps_offset": 1}  # of sd-turbo and sdxl-turbo, as their cards say
X = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Network(torch.nn.Module):
    """A fixed random function of the noisy picture and the step."""

    def __init__(self):
        super().__init__()
        self.mix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2

    def forward(self, x, noise_level, cond):
        return torch.tanh(torch.einsum("dc,bchw->bdhw", self.mix, x) + like(noise_level, x) / 1000)


def theirs(scheduler, x, **step):
    """What a scheduler of diffusers makes of x, of unit variance, in the loop of its pipelines."""
    scheduler.set_timesteps(STEPS)
    if scheduler.init_noise_sigma != 1:  # it works on x / alpha
        x = x * (scheduler.sigmas[0].double() ** 2 + 1).sqrt()
    for t in scheduler.timesteps:
        x = scheduler.step(Network()(scheduler.scale_model_input(x, t), t.double(), None), t, x, **step).prev_sample
    return x


def ours(sampler, prediction, x, schedule=SCHEDULE):
    """The same of a sampler; the published networks are told the step."""
    denoiser = Denoiser(Network(), schedule, PREDICTIONS[prediction], Timestep(1000))
    return sampler.walk(lambda x_t, t: denoiser(x_t, t, Cond()), schedule, x, sampler.times(schedule), range(len(x)))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule, betas", [(ScaledLinear, SCALED), (DDPM, {"beta_schedule": "linear"})])
def test_alphas(schedule, betas, zero):
    scheduler = diffusers.EulerDiscreteScheduler(**{"beta_start": 1e-4, "beta_end": 0.02} | betas, rescale_betas_zero_snr=zero)
    alpha, sigma = schedule(zero_terminal_snr=zero)((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sigma**2, 1 - scheduler.alphas_cumprod.double(), atol=1e-6, rtol=0)
    assert (alpha[-1] ** 2 <= 2**-24 * (1 + 1e-9)) == zero and (alpha.diff() < 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "peer, sampler, spare",
    [
        (diffusers.DDIMScheduler, DDIM, 0),
        (diffusers.EulerDiscreteScheduler, Euler, 0),
        (diffusers.DPMSolverMultistepScheduler, DPMpp, 1),
        (diffusers.UniPCMultistepScheduler, UniPC, 1),
    ],
)
def test_deterministic_samplers(peer, sampler, spare, grid, prediction):
    if (peer, grid) == (diffusers.DDIMScheduler, "linspace"):
        pytest.skip("diffusers' DDIM steps by 1000 // steps, whatever the grid")
    points, spacing = GRIDS[grid]
    points = points if grid == "trailing" else type(points)(spare=spare)
    only = {"clip_sample": False} if peer is diffusers.DDIMScheduler else {}
    scheduler = peer(**SCALED, **spacing, **only, prediction_type=prediction)
    wanted = theirs(scheduler, X)
    torch.testing.assert_close(ours(sampler(STEPS, grid=points), prediction, X), wanted, atol=1e-4, rtol=0)


def test_ddim_that_stops_at_the_first_step():
    """`set_alpha_to_one` false, as in Stable Diffusion's own config."""
    scheduler = diffusers.DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    drawn = ours(DDIM(STEPS, grid=Leading(last=1 / 1000)), "epsilon", X)
    torch.testing.assert_close(drawn, theirs(scheduler, X), atol=1e-4, rtol=0)


def test_zero_terminal_snr():
    scheduler = diffusers.EulerDiscreteScheduler(
        **SCALED, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    drawn = ours(Euler(STEPS, grid=Trailing()), "v_prediction", X, ScaledLinear(floor=1e-7, zero_terminal_snr=True))
    torch.testing.assert_close(drawn, theirs(scheduler, X), atol=1e-4, rtol=0)


def test_karras_grid():
    scheduler = diffusers.EulerDiscreteScheduler(**SCALED, use_karras_sigmas=True, prediction_type="v_prediction")
    drawn = ours(Euler(STEPS, grid=Karras()), "v_prediction", X)
    torch.testing.assert_close(drawn, theirs(scheduler, X), atol=1e-4, rtol=0)


class Exploding:
    """Stable Diffusion's table told as x_t / alpha, which diffusers' Euler and Heun work on."""

    def __call__(self, t):
        alpha, sigma = SCHEDULE(t)
        return torch.ones_like(alpha), sigma / alpha


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("grid", GRIDS)
def test_heun_where_its_path_is_diffusers(grid, prediction):
    points, spacing = GRIDS[grid]
    scheduler = diffusers.HeunDiscreteScheduler(**SCALED, **spacing, prediction_type=prediction)
    wanted = theirs(scheduler, X)
    begun = X * (scheduler.sigmas[0].double() ** 2 + 1).sqrt()
    drawn = ours(Heun(STEPS, grid=points), prediction, begun, Exploding())
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)


def test_heun_of_flow_matching():
    """On the linear schedule; the last step, from sigma = 1 / 1000, has no corrector."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    times, x = scheduler.sigmas[0:-1:2].double(), X
    for t in scheduler.timesteps:
        x = scheduler.step(Network()(x, t.double() - 1, None), t, x).prev_sample
    listed = Listed([*times.tolist(), 0.0])
    denoiser = Denoiser(Network(), Linear(floor=1e-9), Flow(), Timestep(1000), unit_input=False)
    drawn = Heun(grid=listed).walk(lambda x_t, t: denoiser(x_t, t, Cond()), Linear(floor=1e-9), X, listed(0, None), [0, 1])
    torch.testing.assert_close(drawn, x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("p", [1, 3])
def test_unipc_of_other_orders(p):
    scheduler = diffusers.UniPCMultistepScheduler(
        **SCALED, timestep_spacing="trailing", prediction_type="v_prediction", solver_order=p
    )
    drawn = ours(UniPC(STEPS, p, Trailing()), "v_prediction", X)
    torch.testing.assert_close(drawn, theirs(scheduler, X), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "peer, only, step, sampler",
    [
        (diffusers.DDPMScheduler, {"clip_sample": False}, {}, Ancestral(STEPS, grid=Leading(offset=0))),
        (
            diffusers.DDPMScheduler,
            {"clip_sample": False, "variance_type": "fixed_large"},
            {},
            Ancestral(STEPS, v=1.0, grid=Leading(offset=0)),
        ),
        (diffusers.DDIMScheduler, {"clip_sample": False, "steps_offset": 1}, {"eta": 0.7}, DDIM(STEPS, 0.7, Leading())),
        (diffusers.EulerAncestralDiscreteScheduler, {}, {}, EulerAncestral(STEPS, grid=Linspace())),
        (diffusers.EulerAncestralDiscreteScheduler, TURBO, {}, EulerAncestral(STEPS, grid=Trailing())),
        (
            diffusers.DPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"},
            {},
            DPMppSDE(STEPS, Trailing()),
        ),
    ],
    ids=["ddpm", "ddpm_large", "ddim_eta", "euler_ancestral", "turbo", "dpmpp_sde"],
)
def test_stochastic_samplers_given_the_same_noise(peer, only, step, sampler, monkeypatch):
    """diffusers draws for the whole batch; here it is handed what each picture's own seed says."""
    draw = Streams(range(len(X)))
    monkeypatch.setattr(f"{peer.__module__}.randn_tensor", lambda shape, **_: draw(X))
    scheduler = peer(**SCALED, **only, prediction_type="v_prediction")
    torch.testing.assert_close(ours(sampler, "v_prediction", X), theirs(scheduler, X, **step), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps, original, scaling", [(1, 50, 10.0), (4, 50, 10.0), (7, 37, 10.0), (4, 1000, 0.01)])
def test_a_latent_consistency_models_steps(steps, original, scaling, prediction, monkeypatch):
    """diffusers' LCMScheduler in float64, given each picture's noise; 0.01 and 1000 steps make its boundary count."""
    draw = Streams(range(len(X)))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda shape, **_: draw(X))
    told = {"original_inference_steps": original, "timestep_scaling": scaling, "prediction_type": prediction}
    scheduler, x = diffusers.LCMScheduler(**SCALED, **told), X
    scheduler.alphas_cumprod = SCHEDULE((torch.arange(1000, dtype=torch.float64) + 1) / 1000)[0] ** 2
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(Network()(x, t.double(), None), t, x).prev_sample
    drawn = ours(Consistency(steps, scaling, Distilled(original=original)), prediction, X)
    torch.testing.assert_close(drawn, x, atol=1e-6, rtol=1e-6)  # its boundary is of float32


@pytest.mark.parametrize("steps", [1, 10, 28])
def test_grids_of_straight_paths(steps):
    """Stable Diffusion 3's static shift, and Flux' by the number of patches: the sigmas of FlowMatchEulerDiscreteScheduler."""
    static, dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    static.set_timesteps(steps)
    torch.testing.assert_close(Shifted(3.0)(steps, Linear()), static.sigmas.double(), atol=1e-6, rtol=0)
    for height, width in ((32, 32), (96, 160)):
        dynamic.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(height * width // 4))
        times = BySize().sized(height, width)(steps, Linear())
        torch.testing.assert_close(times, dynamic.sigmas.double(), atol=1e-6, rtol=0)


def test_a_grid_by_size_is_asked_for_the_pictures_own():
    """One Euler step from noise: where it begins tells which grid was taken."""
    seen = []
    for size in (8, 64):
        Euler(2, grid=BySize())(lambda x, t: seen.append(float(t)) or x, Linear(), torch.zeros(1, 4, size, size), [0])
    assert seen[0] == seen[2] == 1.0 and seen[1] < seen[3]
