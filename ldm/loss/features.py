"""Perceptual distance in the features of a frozen CLIP's image tower."""

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.tower.clip import load_clip, see


class Features(nn.Module):
    """Mean squared distance of unit-length token features after every block of a vision transformer.

    The form is LPIPS' (https://arxiv.org/abs/1801.03924, equation 1) without learned weights. `model` and `pretrained` are
    open_clip's: a name with a tag or a local file, or `local-dir:FOLDER`.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        super().__init__()
        self.tower = load_clip(model, pretrained, "loss").visual
        if not hasattr(self.tower, "transformer"):
            raise Refusal(f"loss.model={model} has no vision transformer; choose a ViT of open_clip's.")

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Both (B, 3, h, w) in [-1, 1] -> (), at least 0. Gradients reach `images`; the tower stays as it is."""
        with torch.no_grad():
            wanted = self.features(targets)
        return torch.stack([(a - b).square().sum(-1).mean() for a, b in zip(self.features(images), wanted)]).mean()

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, h, w) in [-1, 1] -> unit-length features (B, N, D) after each block, in float32."""
        out = self.tower.forward_intermediates(see(self.tower, images), intermediates_only=True, output_fmt="NLC")
        return [torch.nn.functional.normalize(h.float(), dim=-1) for h in out["image_intermediates"]]

    def train(self, mode: bool = True) -> "Features":
        """Always in evaluation mode."""
        return super().train(False)
