"""Whether a picture has the colours of its classes within the boxes of its request."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Reference, Rows
from ldm.metric._colours import labels_of, regions
from ldm.types import Batch


class LayoutIoU:
    """The mean over pictures of the mean over boxes of the intersection over union of a box with the region of its class.

    The region of class c is where colour c of `palette` (K colours in 0 to 255) is a pixel's nearest. Requests without a box are
    left out.
    """

    of, against = "drawing", None

    def __init__(self, palette: Sequence[Sequence[int]]) -> None:
        self.palette = [tuple(colour) for colour in palette]
        self.protocol = {"extractor": "nearest colour, boxes", "palette": self.palette}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: boxes, image -> iou, real: (B), NaN where there is no box.

        Raises:
            Refusal: the requests have no boxes.
        """
        if "boxes" not in batch:
            raise Refusal(f"layout_iou reads the field 'boxes', and there is only {sorted(batch)} (condition=[layout]).")
        return {name: self._iou(x, batch["boxes"]) for name, x in {"iou": images, "real": batch["image"]}.items()}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> in [0, 1]: `layout_iou` of the drawings, and `layout_iou_real` of the pictures that the boxes came from, which is
        what a perfect drawing would get.
        """
        overlaps = {"layout_iou": rows["iou"], "layout_iou_real": rows["real"]}
        return {name: Estimate.mean(values[~values.isnan()]) for name, values in overlaps.items()}

    def _iou(self, images: Tensor, boxes: Sequence[Sequence[Sequence[float]]]) -> Tensor:
        masks = regions(labels_of(images, self.palette), len(self.palette)).cpu()
        height, width = images.shape[2:]
        y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
        means = []
        for region, row in zip(masks, boxes):
            each = [region[int(c)] for c, *_ in row]
            inside = [((y >= t) & (y < b))[:, None] & ((x >= left) & (x < r)) for _, left, t, r, b in row]
            ious = [((a & b).sum() / (a | b).sum().clamp(min=1)).item() for a, b in zip(each, inside)]
            means.append(sum(ious) / len(ious) if ious else float("nan"))
        return torch.tensor(means)
