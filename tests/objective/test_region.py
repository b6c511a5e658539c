"""A loss that counts where a mask is white."""

import pytest
import torch
from torch import nn

from ldm.denoiser import Denoiser, LogRatio
from ldm.errors import Refusal
from ldm.objective.region import Region
from ldm.objective.regression import Regression
from ldm.prediction import Flow
from ldm.schedule import Linear
from ldm.types import Cond, Draw

X, DRAW = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), Draw(0, torch.arange(4), 4)


class Model:
    net = nn.Conv2d(3, 3, 1)
    denoiser = Denoiser(lambda x, level, cond: Model.net(x), Linear(), Flow(), LogRatio())


def loss(mask):
    return Region()(Model, {"mask": mask}, X, Cond(), DRAW)["loss"]


def test_white_is_the_regression_and_black_counts_nothing():
    white = torch.ones(4, 3, 8, 8)
    plain = Regression()(Model, {}, X, Cond(), DRAW)["loss"]
    assert torch.equal(loss(white), plain) and loss(-white) == 0
    assert torch.allclose(loss(0 * white), plain / 2)


def test_a_half_is_the_error_there():
    """By area where the mask is finer than the latents; a label map counts where it is not 0."""
    mask = -torch.ones(4, 3, 8, 8)
    mask[..., :3] = 1
    region = torch.tensor([1.0, 0.5, 0, 0])
    seen = {}
    part = Regression(distance=lambda error: seen.setdefault("error", error.square()))
    part(Model, {}, X, Cond(), DRAW)
    torch.testing.assert_close(loss(mask), (seen["error"] * region).mean())
    labels = torch.zeros(4, 8, 8, dtype=torch.int64)
    labels[..., :3] = 7
    assert torch.equal(loss(labels), loss(mask))


def test_no_gradient_comes_from_where_it_is_black():
    mask = torch.ones(4, 3, 8, 8)
    mask[:2] = -1
    Model.net.zero_grad()
    loss(mask).backward()
    both = Model.net.weight.grad.clone()
    Model.net.zero_grad()
    error, _ = Regression().each(Model.denoiser, X, Cond(), DRAW)
    (error[2:].sum() / 4).backward()
    torch.testing.assert_close(both, Model.net.weight.grad)


def test_a_batch_without_it_is_refused():
    with pytest.raises(Refusal, match=r"reads the field 'mask', .*\+data\.fields\.mask=mask\.png"):
        Region()(Model, {"image": X}, X, Cond(), DRAW)
