"""Precision (are drawings among the real pictures?) and recall (are real pictures among the drawings?)."""

from collections.abc import Callable, Mapping

from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._neighbours import both, radii, within
from ldm.types import Batch


class PrecisionRecall:
    """Improved precision and recall (https://arxiv.org/abs/1904.06991, equations 1 to 3): a picture is in a set's manifold where
    it lies within the distance of some member to its `k`-th neighbour. ADM judges in Inception's features, as the default does.
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
