"""How well a drawing keeps the edges of the control picture that it was drawn for."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ldm.edges import edges
from ldm.errors import Refusal
from ldm.measure import Estimate, Reference, Rows
from ldm.types import Batch


class EdgeF1:
    """The mean over pictures of F1 = 2 P R / (P + R) of Canny edges: P is the share of the drawing's edge pixels that lie on the
    control picture's edges, R the share of the control picture's edge pixels that are drawn.

    `key` is the field of the control picture. An edge pixel counts as met within `slack` pixels, at least 0.
    """

    of, against = "drawing", None

    def __init__(self, key: str = "edges", slack: int = 1) -> None:
        self.key, self.slack = key, slack
        self.protocol = {"extractor": "Canny", "slack": slack, "edges": key}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: the control picture (B, 3, h, w), white on black, image -> f1, real: (B).

        Raises:
            Refusal: the requests have no control picture.
        """
        if self.key not in batch:
            raise Refusal(
                f"edge_f1 reads the field '{self.key}', and there is only {sorted(batch)}: +data.fields.{self.key}={self.key}.png"
            )
        wanted = batch[self.key].mean(1, keepdim=True) > 0
        return {"f1": self._f1(edges(images), wanted), "real": self._f1(edges(batch["image"]), wanted)}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> in [0, 1]: `edge_f1` of the drawings, and `edge_f1_real` of the pictures that the edges came from, which is what a
        perfect drawing would get.
        """
        return {"edge_f1": Estimate.mean(rows["f1"]), "edge_f1_real": Estimate.mean(rows["real"])}

    def _f1(self, drawn: Tensor, wanted: Tensor) -> Tensor:
        precision, recall = self._share(drawn, wanted), self._share(wanted, drawn)
        return 2 * precision * recall / (precision + recall).clamp(min=1e-12)

    def _share(self, pixels: Tensor, others: Tensor) -> Tensor:
        """(B, 1, h, w) bool each -> the share of `pixels` that lie within `slack` of `others`, (B); 1 where there are none."""
        near = max_pool2d(others.float(), 2 * self.slack + 1, stride=1, padding=self.slack) > 0
        count = pixels.flatten(1).sum(1)
        return torch.where(count > 0, (pixels & near).flatten(1).sum(1) / count.clamp(min=1), 1.0)
