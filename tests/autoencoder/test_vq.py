"""The vector-quantised autoencoder: the nearest code, gradients that go straight through, codes that come back."""

import math

import pytest
import torch

from ldm.autoencoder.kl import KL
from ldm.autoencoder.vq import VQ
from ldm.types import Draw

SIZE = {"width": 8, "mult": (1, 2), "res_blocks": 1, "groups": 4}


def vq(**settings):
    return VQ(**{"channels": 2, "codes": 16, **SIZE, **settings})


def whole(x):
    return x


@pytest.mark.parametrize(
    "kind, mult, levels", [(KL, (1, 1, 2, 2, 4, 4), (4, 5)), (VQ, (1, 2, 2, 4), (3,))], ids=["KL-f32", "VQ-f8"]
)
def test_an_attention_stands_behind_every_block_of_the_levels_that_are_named(kind, mult, levels):
    """Each adds its norm and four maps; a level has 2 blocks in the encoder and 3 in the decoder."""
    with torch.device("meta"):
        with_it, without = (sum(p.numel() for p in kind(mult=mult, attention=chosen).parameters()) for chosen in (levels, ()))
    widths = [128 * mult[level] for level in levels]
    assert with_it - without == sum(5 * (2 * w + 4 * (w * w + w)) for w in widths)


@torch.no_grad()
def test_decode_replaces_by_the_nearest_code_and_encode_does_not():
    net, images = vq().eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    net.codebook.normal_()
    net.mean.copy_(torch.randn(2))
    net.std.copy_(torch.rand(2) + 0.5)
    told = net.encode(images)
    z = net.posterior(images).mean
    torch.testing.assert_close(told.mean * net.std[:, None, None] + net.mean[:, None, None], z)
    assert not told.std.any()
    e, numbers = net.quantise(z)
    apart = (z.permute(0, 2, 3, 1)[..., None, :] - net.codebook).square().sum(-1)
    assert torch.equal(numbers, apart.argmin(-1))
    torch.testing.assert_close(net.decode(told.mean), net.reconstruct(e), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.quantise(e)[0], e)


def test_gradients_go_straight_through_and_the_codebook_loss_is_its_formula():
    net, images = vq(ema=False, commitment=0.25), torch.rand(4, 3, 8, 8) * 2 - 1
    z, terms = net.bottleneck(images, Draw(0, torch.arange(4), 4))
    latent = net.posterior(images).mean
    torch.testing.assert_close(terms["codebook"], 1.25 * (z - latent).square().mean())
    (z * torch.arange(4.0).view(4, 1, 1, 1)).sum().backward(retain_graph=True)
    assert net.encoder.conv_in.weight.grad.abs().max() > 0 and net.codebook.grad is None
    terms["codebook"].backward()
    assert net.codebook.grad.abs().max() > 0


def test_the_codebook_is_the_running_mean_of_the_vectors_that_chose_it():
    """With all vectors at one code, counts and sums are geometric series, and the code is their ratio."""
    net = vq(decay=0.5, dead=0.0)
    net.train()
    net.codebook.fill_(9.0)
    net.codebook[3] = 0.0
    points = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    for step, point in enumerate(points):
        net.window.append((point.repeat(5, 1), torch.full((5,), 3)))
        net.update(step, whole)
    assert net.hits[3].item() == pytest.approx(5 * 0.75)
    torch.testing.assert_close(net.codebook[3], (0.25 * points[0] + 0.5 * points[1]) / 0.75)
    assert (net.codebook[:3] == 9).all() and not net.window


def test_dead_codes_come_back_and_all_are_used():
    """512 points in the plane and 64 codes that all start in one place: without revival one code would serve them all."""
    points = torch.randn(512, 2)
    used = {}
    for dead in (0.0, 0.05):
        net = vq(codes=64, dead=dead, decay=0.9)
        for step in range(60):
            _, numbers = net.quantise(points.T.reshape(1, 2, 512, 1))
            net.window.append((points, numbers.flatten()))
            net.update(step, whole)
        e, numbers = net.quantise(points.T.reshape(1, 2, 512, 1))
        used[dead] = net.used(numbers)["usage"].item(), (e.view(2, 512).T - points).square().sum(1).mean().item()
    assert used[0.05][0] > 0.9 > used[0.0][0] and used[0.05][1] < 0.06


def test_latents_that_are_not_finite_leave_the_codebook_as_it_was():
    """One such vector would stay in its code's running sum for good."""
    net, points = vq(dead=0.05), torch.randn(64, 2)
    states = []
    for step, first in enumerate((0.0, float("nan"), float("inf"))):
        points[0, 0] = first
        net.window.append((points.clone(), net.quantise(points.T.reshape(1, 2, 64, 1))[1].flatten()))
        net.update(step, whole)
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    assert net.hits.max() > 0 and not net.window


def test_perplexity_counts_codes():
    net = vq(codes=8)
    told = net.used(torch.tensor([[0, 0, 3], [3, 5, 5]]))
    assert told["perplexity"].item() == pytest.approx(3) and told["usage"].item() == pytest.approx(3 / 8)


@pytest.mark.parametrize("kind", [KL, VQ])
def test_recomputed_activations_give_the_same_gradients(kind):
    images, draw = torch.rand(2, 3, 8, 8) * 2 - 1, Draw(0, torch.arange(2), 2)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = kind(channels=2, **SIZE, attention=(1,), checkpointing=checkpointing)
        z, _ = net.bottleneck(images, draw)
        net.reconstruct(z).square().mean().backward()
        gradients.append(net.encoder.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_any_multiple_of_the_factor_and_no_other():
    net = vq().eval()
    assert net.decode(net.encode(torch.zeros(1, 3, 10, 14)).mean).shape == (1, 3, 10, 14)
    with pytest.raises(ValueError, match=r"9x12 pixels .* factor 2; crop it to 8x12 \(data\.size"):
        net.encode(torch.zeros(1, 3, 9, 12))
    for height, width in ((1, 1), (1, 7)):
        with pytest.raises(ValueError, match=rf"{height}x{width} pixels .* factor 2; 2x2 is the least \(data\.size"):
            net.encode(torch.zeros(1, 3, height, width))
    assert math.log2(net.factor) == 1
    with pytest.raises(ValueError, match=r"groups=8 does not divide the 20 or 40 features .*autoencoder\.groups=4"):
        KL(width=20, mult=(2, 1), groups=8)
