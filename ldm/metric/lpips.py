"""LPIPS: how different pictures look from their originals (https://arxiv.org/abs/1801.03924, equation 1)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.files.weights import weights_hash
from ldm.measure import Estimate, Reference, Rows
from ldm.tower.lpips import Distance
from ldm.types import Batch

PUBLISHED = "pretrained"


class Lpips:
    """The mean over pictures of the distance of tower/lpips.py.

    `net` is alex (most tables), vgg or squeeze. `weights` is a local file of torchvision's network, or `pretrained`, which
    downloads it. `of` is `reconstruction` or `drawing`.
    """

    against = None

    def __init__(self, net: str = "alex", weights: str = PUBLISHED, of: str = "reconstruction") -> None:
        local = None if weights == PUBLISHED else weights
        self.of, self.net = of, Distance(net, local, "metric.lpips", "Or measure without lpips.")
        self.protocol = {"extractor": f"lpips 0.1 {net}", "sha256": weights_hash(self.net), "resize": "none"}

    @torch.no_grad()
    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: image, the originals -> lpips: (B)."""
        layers = self.net.to(images.device)(images, batch["image"])
        return {"lpips": torch.stack([layer.mean((1, 2, 3)) for layer in layers]).sum(0)}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `lpips`, or `drawing_lpips`, at least 0."""
        return {"lpips" if self.of == "reconstruction" else f"{self.of}_lpips": Estimate.mean(rows["lpips"])}
