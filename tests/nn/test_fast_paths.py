"""What is quick says what is plain: to 1e-4 in float32, and in bfloat16 as near to float64 as the plain path is."""

import pytest
import torch
from torch import nn

from ldm.nn import convolution
from ldm.nn.convolution import Convolution

SHAPES = [(1, 3, 8, 8), (2, 3, 5, 7)]


@pytest.fixture
def pair(monkeypatch):
    """A convolution that takes the product of matrices, whatever its size, and torch's own with the same weights."""
    monkeypatch.setattr(convolution, "KERNEL", 0)

    def make(stride):
        plain = nn.Conv2d(3, 6, 3, stride, padding=1)
        quick = Convolution(3, 6, 3, stride, padding=1)
        quick.load_state_dict(plain.state_dict())
        return quick, plain

    return make


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_as_a_product(pair, shape, stride):
    quick, plain = pair(stride)
    x = torch.randn(shape)
    outs, grads = [], []
    for net in (quick, plain):
        seen = x.clone().requires_grad_()
        outs.append(net(seen))
        (outs[-1].sin().sum()).backward()
        grads.append([seen.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(outs[0], outs[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_in_few_bits(pair, stride):
    quick, plain = (net.to(torch.bfloat16) for net in pair(stride))
    x = torch.randn(4, 3, 5, 5).to(torch.bfloat16)
    exact = nn.functional.conv2d(x.double(), plain.weight.double(), plain.bias.double(), stride, 1)
    error, allowed = ((net(x) - exact).abs().max() for net in (quick, plain))
    assert error <= 1.5 * allowed


def test_only_large_kernels_on_small_pictures_are_products(monkeypatch):
    seen = []
    monkeypatch.setattr(convolution, "unfold", lambda x, *_, **__: seen.append(x.shape) or nn.functional.unfold(x, 3, padding=1))
    with torch.no_grad():
        for channels, side in ((8, 8), (1280, 16), (1280, 8)):
            Convolution(channels, channels, 3, padding=1)(torch.zeros(1, channels, side, side))
    assert seen == [(1, 1280, 8, 8)]
