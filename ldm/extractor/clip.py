"""The image tower of a CLIP, by open_clip's name or from a local folder, with open_clip's own preprocessing."""

import torch
from torch import Tensor

from ldm.extractor._weights import frozen
from ldm.measure import Rows, transformed
from ldm.tower.clip import load_clip, preprocess, settings, transform


class Clip:
    """Pictures of any size -> `features` (B, E), the image tower's embeddings, not normalised.

    `model` and `weights` are open_clip's name and tag or local file, or `local-dir:FOLDER` without weights.
    """

    def __init__(self, model: str, weights: str | None = None) -> None:
        self.clip = load_clip(model, weights, "metric.<name>.extractor")
        self.transform = transform(self.clip.visual)
        name = f"open_clip {model} {weights or ''}".strip()
        self.protocol = frozen(self.clip, name, "open_clip's own, on 8-bit pictures", preprocess=settings(self.clip.visual))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> features: (B, E)."""
        self.clip.to(images.device)
        return {"features": self.clip.encode_image(transformed(images, self.transform)).float()}

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """images: (B, 3, h, w) in [-1, 1] -> a vision transformer's features of each patch: (B, D, h', w')."""
        tower = self.clip.to(images.device).visual
        pixels = preprocess(tower, images)
        return tower.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][-1]
