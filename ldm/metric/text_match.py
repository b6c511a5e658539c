"""Whether a picture drawn for a training caption looks like the picture that the caption names."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.types import Batch


class TextMatch:
    """Top-1: the nearest training picture (L2 after pooling to side x side) is the caption's own.

    A test of conditioning, not of generalisation. `matched` holds the answers, picture by picture.
    """

    of = "drawing"

    def __init__(self, side: int = 16) -> None:
        self.side = side
        self.known, self.matched = torch.empty(0), torch.empty(0, dtype=torch.bool)

    def prepare(self, data: object) -> None:
        """Pools the whole training set."""
        batches = data.ordered("train", batch=256)
        self.known = torch.cat([self._pool(data.on_after_batch_transfer(b, 0)["image"]) for b in batches])

    def update(self, images: Tensor, batch: Batch) -> None:
        """images: (B, 3, h, w) drawn, in [-1, 1]; batch: position (B), the training sample that each caption names."""
        found = torch.cdist(self._pool(images.cpu()), self.known).argmin(dim=1)
        self.matched = torch.cat((self.matched, found == batch["position"].cpu()))

    def compute(self) -> dict[str, float]:
        """-> {"text_match_top1": share in [0, 1]}."""
        return {"text_match_top1": self.matched.float().mean().item()}

    def _pool(self, images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images.float(), self.side).flatten(1)
