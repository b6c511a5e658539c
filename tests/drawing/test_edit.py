"""Drawing from a picture, on data whose denoiser is exact."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm.autoencoder.identity import Identity
from ldm.drawing.edit import FromInversion, FromPicture, Inpainting, last_part
from ldm.drawing.request import read_edit
from ldm.sampler.ddim import DDIM
from ldm.sampler.ddpm import DDPM
from ldm.sampler.dpmpp import DPMpp
from ldm.sampler.grid import BySize
from ldm.sampler.heun import Heun
from ldm.schedule import Cosine, Linear, ScaledLinear

SCHEDULES = pytest.mark.parametrize("schedule", [Linear(), Cosine(), ScaledLinear()], ids=lambda s: type(s).__name__)
RHO = 0.8


def pair(schedule):
    """The exact denoiser of two pixels, side by side: normal, of unit variance and correlation RHO."""
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)

    def denoise(x_t, t, to=None):
        alpha, sigma = schedule(t)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
        return torch.einsum("ij,bchj->bchi", gain, x_t)

    return denoise


def data(n):
    x, noise = torch.randn(2, n, 1, 1, 1, dtype=torch.float64)
    return torch.cat((x, RHO * x + (1 - RHO**2) ** 0.5 * noise), dim=3)


@SCHEDULES
def test_strength_0_gives_the_picture_back_and_1_forgets_it(schedule):
    picture, noise = data(256), torch.randn(256, 1, 1, 2, dtype=torch.float64)
    same = FromPicture(DPMpp(20), picture, 0.0)(pair(schedule), schedule, noise, range(256))
    assert torch.equal(same, picture)
    mask = torch.ones(1, 1, 1, 2)
    for edit in (Inpainting(DPMpp(20), picture, mask, 2, 0.0), FromInversion(DDIM(20), picture, lambda n: pair(schedule), 0.02)):
        assert torch.equal(edit(pair(schedule), schedule, noise, range(256)), picture), "too little for one step is none"
    other = FromPicture(DPMpp(20), picture, 1.0)(pair(schedule), schedule, noise, range(256))
    assert abs(torch.corrcoef(torch.stack((picture.flatten(), other.flatten())))[0, 1]) < 4 / 512**0.5 + 0.07


def test_an_edit_walks_the_grid_of_its_pictures_size():
    """A grid that follows the size (Flux dev) is that of the picture, and not the one of unknown sizes."""
    times = []
    noise = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    sampler = DDIM(4, grid=BySize(patch=1))

    def denoise(x_t, t, to=None):
        times.append(float(t.flatten()[0]))
        return x_t * 0

    FromPicture(sampler, noise * 0, 1.0)(denoise, Linear(), noise, [0])
    assert times == pytest.approx(BySize(patch=1).sized(4, 6)(4, Linear())[:-1].tolist())
    assert times[1] != pytest.approx(sampler.times(Linear())[1].item())


def test_image_to_image_keeps_the_datas_distribution_at_every_strength():
    """Noised data is distributed as x_t is, so that drawing on gives data: the same moments within 4 standard errors."""
    picture, noise, n = data(4096), torch.randn(4096, 1, 1, 2, dtype=torch.float64), 4096
    for strength in (0.3, 0.7):
        drawn = FromPicture(Heun(40), picture, strength)(pair(Cosine()), Cosine(), noise, range(n))[:, 0, 0]
        covariance = torch.cov(drawn.T)
        assert (covariance[0, 0] - 1).abs() < 4 * (2 / n) ** 0.5 and (covariance[0, 1] - RHO).abs() < 4 * (2 / n) ** 0.5
        kept = torch.corrcoef(torch.stack((picture[:, 0, 0, 0], drawn[:, 0])))[0, 1]
        assert (0.7 if strength == 0.3 else -0.1) < kept < (1.0 if strength == 0.3 else 0.7)


def test_one_picture_serves_all_and_the_strength_is_checked():
    picture, noise = data(1), torch.randn(3, 1, 1, 2, dtype=torch.float64)
    assert FromPicture(DDIM(4), picture, 0.5)(pair(Cosine()), Cosine(), noise, range(3)).shape == noise.shape
    times = DDIM(10).times(Cosine())
    assert [len(last_part(times, s)) for s in (0.0, 0.3, 1.0)] == [1, 4, 11] and last_part(times, 0.3)[-1] == times[-1]
    with pytest.raises(ValueError, match=r"strength=1\.5"):
        last_part(times, 1.5)


@SCHEDULES
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inversion_comes_back_and_the_better_the_more_steps(schedule, strength):
    picture, noise = data(16), torch.zeros(16, 1, 1, 2, dtype=torch.float64)
    errors = []
    for steps in (100, 200):
        edit = FromInversion(DDIM(steps), picture, lambda count: pair(schedule), strength)
        errors.append((edit(pair(schedule), schedule, noise, range(16)) - picture).abs().max().item())
    assert errors[1] < 0.1 and errors[0] / errors[1] > 1.5


def test_inversion_by_a_sampler_that_only_falls_is_refused():
    noise = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="DDPM cannot be walked from data to noise; invert with sampler=ddim"):
        FromInversion(DDPM(5), data(2), lambda count: pair(Cosine()))(pair(Cosine()), Cosine(), noise, range(2))


def test_inversion_meets_the_noise_that_draws_the_picture():
    """On a Gaussian the flow is linear, and the noise of a picture is known: its whitened self."""
    schedule, picture = Cosine(), data(8)
    times = Heun(400).times(schedule)
    begun = Heun(400).walk(pair(schedule), schedule, schedule(times[-1])[0] * picture, times.flip(0), range(8))
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(begun[:, 0, 0], picture[:, 0, 0] @ whiten, atol=2e-2, rtol=2e-2)


def test_inpainting_draws_from_the_conditional_distribution():
    """Given the left pixel, the right one is normal of mean RHO * left and variance 1 - RHO^2; resamples bring it there."""
    mask, picture = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2), torch.full((1, 1, 1, 2), 1.5, dtype=torch.float64)
    noise, errors = torch.randn(4, 1, 512, 2, dtype=torch.float64), []
    for resamples in (1, 8):
        edit = Inpainting(DDPM(30), picture, mask, resamples)
        drawn = edit(pair(Cosine()), Cosine(), noise, range(4))[..., 1]
        errors.append(abs(drawn.mean().item() - RHO * 1.5))
    assert errors[1] < 0.12 and errors[1] < errors[0] / 3
    assert drawn.var().item() == pytest.approx(1 - RHO**2, abs=0.15)


def test_inpainting_keeps_what_the_mask_does_not_name():
    picture, mask = data(1), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    drawn = Inpainting(DPMpp(5), picture, mask)(pair(Linear()), Linear(), torch.randn(3, 1, 1, 2).double(), range(3))
    assert (drawn[..., 1] == picture[..., 1]).all() and (drawn[..., 0] != picture[..., 0]).all()


def test_inpainting_takes_each_step_at_least_once():
    with pytest.raises(ValueError, match="resamples=0: each step"):
        Inpainting(DPMpp(5), data(1), torch.ones(1, 1, 1, 2), resamples=0)


def test_a_picture_does_not_see_its_batch():
    noise, mask = torch.randn(4, 1, 1, 2, dtype=torch.float64), torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    edit = Inpainting(DDPM(6), data(1), mask)
    whole = edit(pair(Cosine()), Cosine(), noise, range(4))
    parts = torch.cat([edit(pair(Cosine()), Cosine(), noise[i : i + 1], [i]) for i in range(4)])
    torch.testing.assert_close(whole, parts)


def test_what_is_asked_of_a_picture(tmp_path):
    """init, mask and source as sample.py reads them, on pixels."""
    told = []
    model = SimpleNamespace(autoencoder=Identity(), denoiser=torch.nn.Linear(1, 1), condition=told.append)
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    half = Image.new("L", (8, 8))
    half.paste(255, (0, 0, 4, 8))
    half.save(tmp_path / "half.png")
    red, mask = str(tmp_path / "red.png"), str(tmp_path / "half.png")
    ask, config = {"caption": ["a", "b"]}, {"strength": 0.5, "init": red}

    assert read_edit({"init": None}, model, ask, DDIM(4), (8, 8)) == DDIM(4)
    begun = read_edit(config, model, ask, DDIM(4), (8, 8))
    assert isinstance(begun, FromPicture) and begun.strength == 0.5 and begun.picture.shape == (1, 3, 8, 8)
    assert begun.picture[0, :, 3, 3].tolist() == [1, -1, -1]
    painted = read_edit({"init": red, "mask": mask}, model, ask, DDIM(4), (8, 8))
    assert painted.mask[0, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0] and (painted.resamples, painted.strength) == (4, 0.6)
    assert read_edit(config | {"mask": mask, "resamples": 3}, model, ask, DDIM(4), (8, 8)).resamples == 3
    read_edit(config | {"source": "red"}, model, ask, DDIM(4), (8, 8)).source(2)
    assert told == [{"caption": ["red", "red"]}]
    for wrong in ({"init": None, "mask": mask}, {"mask": mask, "source": "red"}):
        with pytest.raises(ValueError, match="one of mask and source"):
            read_edit(config | wrong, model, ask, DDIM(4), (8, 8))
    for unread in ({"init": None}, {"resamples": 3}, {"source": ["red", "green"]}):
        with pytest.raises(ValueError, match=r"strength=0\.5 goes with init|resamples=3 goes with mask|one text says"):
            read_edit(config | unread, model, ask, DDIM(4), (8, 8))
    with pytest.raises(FileNotFoundError, match=r"mask=nothing\.png: there is no such picture"):
        read_edit(config | {"mask": "nothing.png"}, model, ask, DDIM(4), (8, 8))
