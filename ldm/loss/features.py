"""Perceptual distance in the features of a frozen CLIP's image tower.

d(x, y) = mean over blocks l and tokens of |f_l(x) - f_l(y)|^2, f_l of unit length: LPIPS (https://arxiv.org/abs/1801.03924,
equation 1) without learnt weights
"""

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.tower.clip import load_clip, preprocess


class Features(nn.Module):
    """The distance above, in the token features after every block of a vision transformer.

    `model` and `pretrained` are open_clip's name and tag or local file, or `local-dir:FOLDER`.

    Raises:
        Refusal: the model is no vision transformer. NotFound: there is no CLIP in the folder.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        super().__init__()
        self.tower = load_clip(model, pretrained, "loss").visual
        if not hasattr(self.tower, "transformer"):
            raise Refusal(f"loss.model={model} has no vision transformer; choose a ViT of open_clip's.")

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] each -> (), the mean over pictures, at least 0. Gradients flow to `images` alone."""
        with torch.no_grad():
            features = self.features(targets)
        return torch.stack([(a - b).square().sum(-1).mean() for a, b in zip(self.features(images), features)]).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, h, w) in [-1, 1] -> unit-length features (B, N, D) after each block, in float32."""
        out = self.tower.forward_intermediates(preprocess(self.tower, images), intermediates_only=True, output_fmt="NLC")
        return [torch.nn.functional.normalize(h.float(), dim=-1) for h in out["image_intermediates"]]

    def train(self, mode: bool = True) -> "Features":
        """Always in evaluation mode."""
        return super().train(False)
