"""LPIPS as a loss (https://arxiv.org/abs/1801.03924): the mean over pictures of their perceptual distance."""

import torch
from torch import Tensor, nn

from ldm.tower.lpips import Distance

INSTEAD = "Or take the distance in a local CLIP's features, loss=features."


class LPIPS(nn.Module):
    """The mean of tower/lpips.py's distance.

    `net` is vgg (as in Latent Diffusion's loss), alex (as in most tables) or squeeze. `weights` is a local file of torchvision's
    network of that name, .pth or .safetensors; None downloads it.

    Raises:
        Refusal: as `Distance`.
    """

    def __init__(self, net: str = "vgg", weights: str | None = None) -> None:
        super().__init__()
        self.distance = Distance(net, weights, "loss", INSTEAD)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] each -> (), at least 0. Gradients flow to `images` alone.

        Raises:
            Refusal: the pictures are too small for the network.
        """
        return torch.stack([layer.mean() for layer in self.distance(images, targets)]).sum()
