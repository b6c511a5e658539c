"""Density (how much do drawings lie among real pictures?) and coverage (how many real pictures have a drawing near?).

With the ball B_j around real picture j, out to its k-th nearest real neighbour, N real pictures and M drawings
(https://arxiv.org/abs/2002.09797, equations 5 and 6):
density = 1 / (k M) * sum over drawings i of the number of j with i in B_j
coverage = 1 / N * the number of j with a drawing in B_j
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._neighbours import CHUNK, both, radii
from ldm.types import Batch


class DensityCoverage:
    """Density and coverage of an extractor's features.

    Between equal distributions, for many pictures of each, the expected density is 1 and the expected coverage 1 - 2^-k. One
    outlier among the real pictures counts for little, unlike in precision and recall.

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
        k: int = 5,
    ) -> None:
        self.extractor = extractor() if weights is None else extractor(weights=weights)
        self.of, self.against, self.protocol, self.k = of, against, self.extractor.protocol, k

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> what the extractor sees."""
        return self.extractor(images)

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `density`, at least 0, and `coverage` in [0, 1].

        Raises:
            Refusal: no more than k real pictures.
        """
        drawn, real, note = both(rows, reference, "coverage")
        if len(real) <= self.k:
            raise Refusal(f"Density and coverage need more than k={self.k} real pictures; found {len(real)}.")
        radius = radii(real, self.k)
        counts = torch.cat([(torch.cdist(part, real) < radius).sum(1) for part in drawn.split(CHUNK)])
        nearest = torch.cat([torch.cdist(part, drawn).min(1).values for part in real.split(CHUNK)])
        coverage = (nearest < radius).double().mean().item()
        return {"density": Estimate.mean(counts / self.k), "coverage": Estimate(coverage, note=note)}
