"""Precision (are drawings among the real pictures?) and recall (are real pictures among the drawings?).

A picture lies in a set's manifold where its distance to some member is at most that member's to its k-th nearest neighbour in
the set (https://arxiv.org/abs/1904.06991, equations 1 to 3).
precision = the share of drawings in the real pictures' manifold, recall = the share of real pictures in the drawings'
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._neighbours import both, radii, within
from ldm.types import Batch


class PrecisionRecall:
    """Improved precision and recall of an extractor's features; ADM uses Inception's, as the default does.

    Args:
        extractor: makes the network whose features are compared.
        weights: of the extractor, a published name or a local file; None for its own default.
        of: which pictures are judged, `drawing` or `reconstruction`.
        against: which real pictures they are compared with, `reference` or `train`.
        k: which neighbour a ball reaches to, at least 1.
    """

    def __init__(
        self,
        extractor: Callable[..., Extractor],
        weights: str | None = None,
        of: str = "drawing",
        against: str = "reference",
        k: int = 3,
    ) -> None:
        self.extractor = extractor() if weights is None else extractor(weights=weights)
        self.of, self.against, self.protocol, self.k = of, against, self.extractor.protocol, k

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> what the extractor sees."""
        return self.extractor(images)

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `precision` and `recall`, shares in [0, 1].

        Raises:
            Refusal: no more than k pictures.
        """
        drawn, real, note = both(rows, reference, "recall")
        if min(len(drawn), len(real)) <= self.k:
            raise Refusal(
                f"Precision and recall need more than k={self.k} pictures of each set; found {len(drawn)} and {len(real)}."
            )
        precision = within(drawn, real, radii(real, self.k))
        recall = within(real, drawn, radii(drawn, self.k))
        return {"precision": Estimate.mean(precision.float()), "recall": Estimate(recall.double().mean().item(), note=note)}
