"""Density (how much do drawings lie among real pictures?) and coverage (how many real pictures have a drawing near?)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._neighbours import CHUNK, both, radii
from ldm.types import Batch


class DensityCoverage:
    """https://arxiv.org/abs/2002.09797, equations 5 and 6: balls around real pictures, out to the `k`-th real neighbour.

    For equal distributions density is 1, which more may exceed, and coverage 1 - 2^-k for many pictures of each. One outlier
    among the real pictures does not count for much, as it does in precision and recall.
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
