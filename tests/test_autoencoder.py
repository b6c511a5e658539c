"""What test_networks leaves: pictures do not see each other, and statistics undo what they do."""

import torch

from ldm.autoencoder.kl import KL


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
