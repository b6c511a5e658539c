"""The adversary of an autoencoder: a discriminator of patches, and the adversarial losses of the two.

              discriminator minimises                           autoencoder minimises
Hinge         (E max(0, 1 - D(real)) + E max(0, 1 + D(fake))) / 2   -E D(fake)
NonSaturating (E softplus(-D(real)) + E softplus(D(fake))) / 2      E softplus(-D(fake))

D is the discriminator's logit of being real, and E the mean over pictures and patches.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from ldm.errors import Refusal


class PatchGAN(nn.Module):
    """A discriminator of overlapping patches (https://arxiv.org/abs/1611.07004, section 3.2.2; `layers` = 3 sees 70 x 70 pixels).

    `width` is the number of features of the first layer. GroupNorm, with at most `groups` groups, replaces the paper's BatchNorm,
    so that a picture's logits depend neither on its batch nor on the number of ranks.
    """

    def __init__(self, width: int = 64, layers: int = 3, groups: int = 32) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        self.conv_in = nn.Conv2d(3, width, 4, stride=2, padding=1)
        strides = [2] * (layers - 1) + [1]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride, padding=1, bias=False) for a, b, stride in zip(widths, widths[1:], strides)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(groups, b // 2), b) for b in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] -> (B, 1, h', w'), a logit of being real for each patch.

        Raises:
            Refusal: the pictures are smaller than a patch's stride allows.
        """
        least = 2 ** len(self.convs) * 3
        if min(images.shape[2:]) < least:
            fitting = (min(images.shape[2:]) // 3).bit_length() - 1
            raise Refusal(
                f"Pictures of {images.shape[2]}x{images.shape[3]} pixels are too small for {len(self.convs)} layers of patches, "
                f"which need {least}; use "
                + (f"adversary.network.layers={fitting}." if fitting > 0 else "adversary=null: one layer needs 6.")
            )
        h = leaky_relu(self.conv_in(images), 0.2)
        for conv, norm in zip(self.convs, self.norms):
            h = leaky_relu(norm(conv(h)), 0.2)
        return self.conv_out(h)


class Hinge:
    """The hinge loss (https://arxiv.org/abs/1705.02894, section 3), halved as in VQGAN."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of each -> ()."""
        return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())

    def generator(self, fake: Tensor) -> Tensor:
        """Logits (B, 1, h, w) -> ()."""
        return -fake.mean()


class NonSaturating:
    """The non-saturating cross-entropy (https://arxiv.org/abs/1406.2661, section 3), halved."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of each -> ()."""
        return 0.5 * (softplus(-real).mean() + softplus(fake).mean())

    def generator(self, fake: Tensor) -> Tensor:
        """Logits (B, 1, h, w) -> ()."""
        return softplus(-fake).mean()
