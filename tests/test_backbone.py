"""What test_networks leaves: the noise level's waves, tokens in the MLP, heads."""

import math

import pytest
import torch
from torch import nn

from ldm.backbone.mlp import MLP
from ldm.backbone.unet import UNet
from ldm.nn.sinusoid import sinusoid
from ldm.types import Cond, Widths


def test_the_noise_level_is_told_in_cosines_then_sines():
    """CompVis' timestep_embedding, term by term."""
    told = sinusoid(torch.tensor([0.0, 1.0, 999.0]), 8)
    for row, t in zip(told.tolist(), (0, 1, 999)):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-4)


def test_the_mlp_does_not_hear_masked_tokens():
    net, x, level = MLP(2, Widths(tokens=5), size=3, width=16), torch.randn(2, 2, 3, 3), torch.rand(2)
    tokens, mask = torch.randn(2, 4, 5), torch.tensor([[True, True, False, False]] * 2)
    short = net(x, level, Cond(tokens=tokens[:, :2]))
    torch.testing.assert_close(net(x, level, Cond(tokens=tokens, mask=mask)), short)
    assert not torch.allclose(net(x, level, Cond(tokens=tokens)), short, atol=1e-4)


def test_gradients_reach_every_weight_of_the_unet():
    """Once the zero initialisation is broken, no branch is dead."""
    net = UNet(3, Widths(vector=6, tokens=12, spatial=2), width=16, mult=(1, 2), res_blocks=1, depth=(0, 1), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    cond = Cond(vector=torch.randn(2, 6), tokens=torch.randn(2, 4, 12))
    net(torch.randn(2, 5, 8, 8), torch.rand(2) * 100, cond).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
