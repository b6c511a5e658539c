"""The U-Net and the autoencoders: what must not matter does not."""

import pytest
import torch
from torch import nn

from ldm.autoencoder.identity import Identity
from ldm.autoencoder.kl import KL
from ldm.backbone.unet import UNet
from ldm.types import Cond, Widths


def loud(network):
    """Breaks the zero initialisation, so that every branch is heard."""
    for p in network.parameters():
        nn.init.normal_(p, std=0.05)
    return network


@pytest.fixture
def unet():
    widths = Widths(vector=6, tokens=12, spatial=2)
    return loud(UNet(3, widths, width=16, mult=(1, 2), res_blocks=1, depth=(0, 1), heads=2, groups=4))


def ask(n=2, size=8):
    x, level = torch.randn(n, 5, size, size), torch.rand(n) * 100
    return x, level, Cond(vector=torch.randn(n, 6), tokens=torch.randn(n, 4, 12))


def test_every_way_of_listening_is_heard(unet):
    x, level, cond = ask()
    out = unet(x, level, cond)
    assert out.shape == (2, 3, 8, 8)
    maps = x.clone()
    maps[:, 3:] += 1
    others = [
        unet(x, level + 50, cond),
        unet(maps, level, cond),
        unet(x, level, Cond(vector=cond.vector + 1, tokens=cond.tokens)),
        unet(x, level, Cond(vector=cond.vector, tokens=cond.tokens + 1)),
    ]
    assert all((other - out).abs().max() > 1e-4 for other in others)


def test_a_sample_does_not_see_its_batch(unet):
    x, level, cond = ask(3)
    one = unet(x[1:2], level[1:2], Cond(vector=cond.vector[1:2], tokens=cond.tokens[1:2]))
    torch.testing.assert_close(unet(x, level, cond)[1:2], one, atol=1e-5, rtol=1e-4)


def test_the_order_of_tokens_does_not_matter_and_the_mask_hides(unet):
    x, level, cond = ask()
    turned = Cond(vector=cond.vector, tokens=cond.tokens.flip(1))
    torch.testing.assert_close(unet(x, level, cond), unet(x, level, turned), atol=1e-5, rtol=1e-4)
    mask = torch.tensor([[True, True, False, False]] * 2)
    hidden = Cond(vector=cond.vector, tokens=cond.tokens, mask=mask)
    short = Cond(vector=cond.vector, tokens=cond.tokens[:, :2])
    torch.testing.assert_close(unet(x, level, hidden), unet(x, level, short), atol=1e-5, rtol=1e-4)


def test_it_draws_larger_than_it_was_trained(unet):
    assert unet(*ask(1, 16)).shape == (1, 3, 16, 16)


def test_it_starts_silent():
    net = UNet(4, Widths(), width=16, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4)
    assert not net(torch.randn(1, 4, 4, 4), torch.zeros(1), Cond()).any()


def test_levels_must_agree():
    with pytest.raises(ValueError, match=r"backbone\.mult has 2 levels, backbone\.depth has 3"):
        UNet(4, Widths(), mult=(1, 2), depth=(0, 1, 1))


@pytest.fixture
def kl():
    return loud(KL(channels=4, width=8, mult=(1, 1, 2), res_blocks=1, groups=4)).eval()


def test_latents_leave_whitened(kl):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    raw, plain = kl.posterior(images), kl.decode(kl.encode(images).mean)
    kl.mean.copy_(torch.randn(4))
    kl.std.copy_(torch.rand(4) + 0.5)
    told = kl.encode(images)
    torch.testing.assert_close(told.mean * kl.std[:, None, None] + kl.mean[:, None, None], raw.mean)
    torch.testing.assert_close(told.std * kl.std[:, None, None], raw.std)
    torch.testing.assert_close(kl.decode(told.mean), plain, atol=1e-5, rtol=1e-4)


def test_any_multiple_of_the_factor_and_no_other(kl):
    assert kl.factor == 4
    assert kl.encode(torch.zeros(1, 3, 20, 28)).mean.shape == (1, 4, 5, 7)
    assert kl.decode(torch.zeros(1, 4, 5, 7)).shape == (1, 3, 20, 28)
    with pytest.raises(ValueError, match=r"30x33 .* factor 4; crop it to 28x32"):
        kl.encode(torch.zeros(1, 3, 30, 33))


def test_identity_is_exact():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    told = Identity().encode(images)
    assert torch.equal(told.sample(torch.randn(2, 3, 8, 8)), images)
    assert torch.equal(Identity().decode(images), images)
