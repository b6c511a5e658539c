"""Precision (are drawings among the real pictures?) and recall (are real pictures among the drawings?).

A picture lies in a set's manifold where its distance to some member is at most that member's to its k-th nearest neighbour in
the set (https://arxiv.org/abs/1904.06991, equations 1 to 3).
precision = the share of drawings in the real pictures' manifold, recall = the share of real pictures in the drawings'
"""

from collections.abc import Callable, Mapping
from typing import Any

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures
from ldm.metric._neighbours import both, radii, within


class PrecisionRecall(OfFeatures):
    """Improved precision and recall of an extractor's features; ADM uses Inception's, as the default does.

    Args:
        extractor: makes the network whose features are compared.
        k: which neighbour a ball reaches to, at least 1.
        **features: weights, of and against, as in _features.py.
    """

    def __init__(self, extractor: Callable[..., Extractor], k: int = 3, **features: Any) -> None:
        super().__init__(extractor, **features)
        self.k = k

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
