"""Any layer of any image network of torchvision, fed as torchvision feeds it: VGG-16's fc2 and others."""

import torch
from torch import Tensor
from torchvision.models import get_model, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor

from ldm.extractor._weights import frozen, read_weights
from ldm.measure import Rows, transformed


class Torchvision:
    """Pictures of any size -> `features` (B, D), what `layer` says, flattened.

    weights: `pretrained` downloads torchvision's default ones; or a local file of them, held to `sha256` where given.
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
        """images: (B, 3, h, w) in [-1, 1]."""
        return {"features": self.net.to(images.device)(transformed(images, self.transform))["features"].flatten(1).float()}
