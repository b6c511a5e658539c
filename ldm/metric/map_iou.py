"""Whether a picture has its colours where the label map that it was drawn for has its labels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Reference, Rows
from ldm.metric._colours import labels_of, mean_over, regions
from ldm.types import Batch


class MapIoU:
    """The mean over pictures of the mean over the request's labels of the intersection over union of a label's regions in the
    requested map and in the map that is read back from the picture.

    A pixel's label is read back as the number of its nearest colour of `palette` (K colours in 0 to 255). Labels of equal colours
    count as one. `key` is the field of the map.
    """

    of, against = "drawing", None

    def __init__(self, palette: Sequence[Sequence[int]], key: str = "map") -> None:
        self.palette, self.key = [tuple(colour) for colour in palette], key
        self.protocol = {"extractor": "nearest colour", "palette": self.palette, "map": key}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: the map (B, h, w), image -> iou, real: (B).

        Raises:
            Refusal: the requests have no map.
        """
        if self.key not in batch:
            raise Refusal(f"map_iou reads the field '{self.key}', and there is only {sorted(batch)}: +data.fields.map=map.png")
        first = torch.tensor([self.palette.index(colour) for colour in self.palette], device=images.device)
        wanted = first[batch[self.key]]
        return {"iou": self._iou(images, wanted), "real": self._iou(batch["image"], wanted)}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> in [0, 1]: `map_iou` of the drawings, and `map_iou_real` of the pictures that the maps came from, which is what a
        perfect drawing would get.
        """
        return {"map_iou": Estimate.mean(rows["iou"]), "map_iou_real": Estimate.mean(rows["real"])}

    def _iou(self, images: Tensor, wanted: Tensor) -> Tensor:
        a, b = (regions(labels, len(self.palette)) for labels in (labels_of(images, self.palette), wanted))
        both, either = (a & b).sum((2, 3)), (a | b).sum((2, 3))
        return mean_over(both / either.clamp(min=1), b.any(3).any(2))
