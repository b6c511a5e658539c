"""What test_networks leaves: pictures do not see each other, and statistics undo what they do."""

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from ldm.autoencoder.cached import Cached
from ldm.autoencoder.identity import Identity
from ldm.autoencoder.kl import KL, Upsample, kl_divergence
from ldm.autoencoder.tiled import Tiled
from ldm.autoencoder.vq import VQ


def kl():
    return KL(channels=4, width=8, mult=(1, 1, 2), res_blocks=1, groups=4).eval()


@torch.no_grad()
def test_a_picture_does_not_see_its_batch():
    net, images = kl(), torch.rand(3, 3, 16, 16) * 2 - 1
    told = net.encode(images)
    for i in range(3):
        alone = net.encode(images[i : i + 1])
        torch.testing.assert_close(told.mean[i : i + 1], alone.mean, atol=1e-5, rtol=1e-4)
        decoded = net.decode(told.mean)[i : i + 1]
        torch.testing.assert_close(decoded, net.decode(alone.mean), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_statistics_change_latents_and_no_picture():
    """Whatever the statistics, decode(encode(x).sample(noise)) is the same picture."""
    net, images, noise = kl(), torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 4, 4)
    before = net.decode(net.encode(images).sample(noise))
    net.mean.copy_(torch.randn(4))
    net.std.copy_(torch.rand(4) + 0.5)
    told = net.encode(images)
    torch.testing.assert_close(net.decode(told.sample(noise)), before, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(told.mean, net.posterior(images).mean, atol=1e-2)


@torch.no_grad()
def test_it_is_diffusers_autoencoder_on_the_same_weights():
    """The structure of the published KL autoencoders, as another program reads it; and VQ-f4's number of parameters."""
    from diffusers import VQModel

    from benchmarks.autoencoder import peer_of

    net, images = KL(channels=4, width=8, mult=(1, 2, 2), res_blocks=2, groups=4).eval(), torch.rand(2, 3, 16, 24) * 2 - 1
    peer = peer_of(net, 8, (1, 2, 2), 2, 4)
    theirs, ours = peer.encode(images).latent_dist, net.encode(images)
    torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.std, theirs.std, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.decode(ours.mean), peer.decode(theirs.mean).sample, atol=1e-5, rtol=1e-4)
    with torch.device("meta"):
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
        sizes = {"block_out_channels": [128, 256, 512], "layers_per_block": 2, "latent_channels": 3}
        vq = VQModel(**blocks, **sizes, num_vq_embeddings=8192, vq_embed_dim=3)
        assert sum(p.numel() for p in VQ(ema=False).parameters()) == sum(p.numel() for p in vq.parameters())


def test_repeating_pixels_and_convolving_are_one_transposed_convolution():
    layer, x = Upsample(3).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    wanted = conv2d(interpolate(x, scale_factor=2.0, mode="nearest"), layer.weight, layer.bias, padding=1)
    y, weight = layer(x), torch.randn(2, 3, 8, 10, dtype=torch.float64)
    torch.testing.assert_close(y, wanted)
    for mine, theirs in zip(*(torch.autograd.grad((out * weight).sum(), (x, layer.weight, layer.bias)) for out in (y, wanted))):
        torch.testing.assert_close(mine, theirs)


def test_the_kl_of_half_precision_moments_is_theirs():
    """Added up in bfloat16, 1 + 1e-3 is 1 and small divergences vanish."""
    mean, std = torch.full((1, 4, 8, 8), 0.03, dtype=torch.bfloat16), torch.full((1, 4, 8, 8), 1.0, dtype=torch.bfloat16)
    assert kl_divergence(mean, std).item() == pytest.approx(0.5 * mean[0, 0, 0, 0].double().square().item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tile, overlap", [(4, 0), (4, 2), (5, 1), (16, 8)])
def test_tiles_of_what_looks_at_one_pixel_are_the_whole(tile, overlap):
    """Blending weights sum to one: where tiles agree, nothing shows."""
    images = torch.rand(2, 3, 11, 14) * 2 - 1
    tiled = Tiled(Identity(), tile, overlap)
    torch.testing.assert_close(tiled.decode(images), images)
    assert tiled.starts(11)[-1] + tile == 11 or tile == 16
    with pytest.raises(ValueError, match=r"autoencoder\.overlap=3: wanted 0 to 2"):
        Tiled(Identity(), 4, 3)


@torch.no_grad()
def test_tiles_of_a_network_differ_only_where_it_sees_beyond_them():
    """Small pictures are decoded at once; the middle of a tile, beyond the reach of convolutions, is the network's own."""
    net, latents = kl(), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(Tiled(net, 8, 4).decode(latents), net.decode(latents))
    tiled = Tiled(net, 6, 2)
    assert tiled.decode(latents).shape == (2, 3, 32, 32) and tiled.encode(torch.zeros(1, 3, 16, 16)).mean.shape == (1, 4, 4, 4)
    torch.testing.assert_close(tiled.decode(latents)[0, :, :4, :4], net.decode(latents[:1, :, :6, :6])[0, :, :4, :4])


@torch.no_grad()
def test_cached_latents_are_decoded_by_the_autoencoder_that_made_them():
    net, read = kl(), []

    def load():
        read.append(1)
        return net

    cached, latents = Cached(load, 4, 4), torch.randn(2, 4, 2, 2)
    assert not list(cached.parameters()) and not cached.state_dict() and not read
    for _ in range(2):
        torch.testing.assert_close(cached.decode(latents), net.decode(latents))
    assert len(read) == 1 and not cached.state_dict()
    with pytest.raises(ValueError, match=r"autoencoder=cached encodes no pictures: .*data=latents"):
        cached.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"autoencoder\.factor=8, but .* has 4 and 4"):
        Cached(load, 4, 8).decode(latents)
