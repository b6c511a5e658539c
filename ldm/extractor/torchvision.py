"""Any layer of any image network of torchvision, with torchvision's own preprocessing: VGG-16's fc2 and others."""

import torch
from torch import Tensor
from torchvision.models import get_model, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor

from ldm.extractor._weights import frozen, read_weights
from ldm.measure import Rows, transformed


class Torchvision:
    """Pictures of any size -> `features` (B, D), the flattened output of `layer`.

    `model` and `layer` are torchvision's names. `weights` is a local file, which must have `sha256` where that is given, or
    `pretrained`, which downloads torchvision's default ones.
    """

    def __init__(self, model: str, layer: str, weights: str = "pretrained", sha256: str | None = None) -> None:
        published = get_model_weights(model).DEFAULT
        net = get_model(model, weights=None)
        net.load_state_dict(read_weights(weights, "pretrained", published.url, sha256))
        self.net = create_feature_extractor(net.eval(), {layer: "features"})
        self.transform = published.transforms()
        self.protocol = frozen(self.net, f"torchvision {model} {layer}", f"torchvision's own for {published}")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> features: (B, D)."""
        return {"features": self.net.to(images.device)(transformed(images, self.transform))["features"].flatten(1).float()}
