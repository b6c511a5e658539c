"""Whether a picture drawn for a training caption looks like the picture that the caption names."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.errors import Refusal
from ldm.measure import Estimate, Reference, Rows
from ldm.types import Batch


class TextMatch:
    """Top-1: the training picture nearest to the drawing (L2 after pooling to side x side) is the one with the caption.

    It tests conditioning, not generalisation. `matched` holds the answers, picture by picture.
    """

    of, against = "drawing", "train"

    def __init__(self, side: int = 16) -> None:
        self.side = side
        self.protocol = {"extractor": "pooled pixels", "side": side}
        self.matched = torch.empty(0, dtype=torch.bool)

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: position (B), split -> pooled: (B, 3 * side * side), position: (B).

        Raises:
            Refusal: the requests are not of the training set.
        """
        if batch.get("split") != "train":
            raise Refusal(
                "text_match asks whether a drawing is nearest to the training picture that its caption names, so it needs "
                f"requests=train; these requests are of {batch.get('split', 'a file')!r}."
            )
        return {"pooled": adaptive_avg_pool2d(images.float(), self.side).flatten(1), "position": batch["position"]}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> {"text_match_top1": share in [0, 1]}."""
        known = reference.rows()
        nearest = known["position"][torch.cdist(rows["pooled"], known["pooled"]).argmin(dim=1)]
        self.matched = nearest == rows["position"]
        return {"text_match_top1": Estimate.mean(self.matched.float())}
