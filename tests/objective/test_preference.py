"""Diffusion-DPO: log 2 at the reference, diffusers' formula on the same tensors, and which way it moves a model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from helpers.training import diffusion
from ldm.objective import _together
from ldm.objective.noise import Coupled
from ldm.objective.preference import Preference
from ldm.prediction import Flow, Noise, Velocity
from ldm.schedule import Linear, ScaledLinear
from ldm.training.stage.diffusion import Trained
from ldm.types import Draw, like

POSITION = torch.arange(4)
DRAW = Draw(0, POSITION, 4)
IMAGES = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
BATCH = {"image": IMAGES[0], "worse": IMAGES[1], "label": POSITION, "position": POSITION}


def pair(schedule=None, prediction=None, beta=50.0, moved=0.02):
    """A model, and the objective whose reference it began from."""
    model = diffusion().model.eval()
    model.denoiser.schedule, model.denoiser.prediction = schedule or Linear(), prediction or Flow()
    objective = Preference(lambda: copy.deepcopy(model).requires_grad_(False), beta)
    with torch.no_grad():
        for p in model.denoiser.parameters():
            p.add_(moved * torch.randn_like(p))
    return Trained(model, lambda: model), objective


def test_at_the_reference_it_is_log_2():
    model, objective = pair(moved=0.0)
    said = objective(model, BATCH, IMAGES[0], None, DRAW)
    assert said["loss"].item() == pytest.approx(math.log(2), rel=1e-6) and said["preferred"] == 0


@pytest.mark.parametrize(
    "schedule, prediction", [(ScaledLinear(), Noise()), (ScaledLinear(), Velocity()), (Linear(), Flow())], ids=str
)
def test_it_is_diffusers_formula(schedule, prediction):
    """research_projects/diffusion_dpo/train_diffusion_dpo.py, from `model_losses` to `loss`, on the same tensors."""
    model, objective = pair(schedule, prediction)
    x = torch.cat((IMAGES[0], IMAGES[1]))
    t = objective.time(DRAW.stratified("time"), schedule).repeat(2)
    noise = DRAW.normal("noise", x.shape[1:]).repeat(2, 1, 1, 1)
    alpha, sigma = (like(s, x) for s in schedule(t))
    target, losses = prediction.target(x, noise, alpha, sigma), []
    for net in (model, objective.teacher):
        cond = net.conditioner({k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in BATCH.items()})
        model_pred = net.denoiser.output(alpha * x + sigma * noise, t, cond)
        losses.append(F.mse_loss(model_pred, target, reduction="none").mean(dim=[1, 2, 3]).chunk(2))
    (model_losses_w, model_losses_l), (ref_losses_w, ref_losses_l) = losses
    inside_term = -0.5 * 50.0 * ((model_losses_w - model_losses_l) - (ref_losses_w - ref_losses_l))
    said = objective(model, BATCH, IMAGES[0], None, DRAW)
    torch.testing.assert_close(said["loss"], -F.logsigmoid(inside_term).mean())
    torch.testing.assert_close(said["preferred"], (inside_term > 0).float().mean())


def test_with_coupled_noise_the_reference_sees_what_the_model_sees(monkeypatch):
    """Also among several processes, whose noise is laid over all that learn at once: at the reference the loss is log 2."""
    monkeypatch.setattr(_together, "world", lambda: 2)
    monkeypatch.setattr(_together, "_gathered", lambda value: torch.cat((value, value + 1)))
    model, objective = pair(moved=0.0)
    objective.noise = Coupled()
    assert objective(model, BATCH, IMAGES[0], None, DRAW)["loss"].item() == pytest.approx(math.log(2), rel=1e-5)


def test_a_reference_of_another_schedule_is_named():
    model, objective = pair()
    objective.teacher.denoiser.schedule = ScaledLinear()
    with pytest.raises(ValueError, match=r"teacher's schedule is ScaledLinear"):
        objective(model, BATCH, IMAGES[0], None, DRAW)


def test_it_moves_the_model_towards_the_better_picture():
    model, objective = pair(moved=0.0)
    optimizer, seen = torch.optim.Adam(model.denoiser.parameters(), lr=1e-3), []
    for _ in range(12):
        seen.append(objective(model, BATCH, IMAGES[0], None, DRAW))
        optimizer.zero_grad()
        seen[-1]["loss"].backward()
        optimizer.step()
    assert seen[-1]["loss"] < seen[0]["loss"] and seen[-1]["preferred"] == 1
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_a_batch_without_pairs_is_named():
    model, objective = pair()
    with pytest.raises(ValueError, match=r"from the field 'worse'.*\+data\.fields\.worse=MEMBER"):
        objective(model, {"image": IMAGES[0], "label": POSITION}, IMAGES[0], None, DRAW)
