"""Density (how much do drawings lie among real pictures?) and coverage (how many real pictures have a drawing near?).

With the ball B_j around real picture j, out to its k-th nearest real neighbour, N real pictures and M drawings
(https://arxiv.org/abs/2002.09797, equations 5 and 6):
density = 1 / (k M) * sum over drawings i of the number of j with i in B_j
coverage = 1 / N * the number of j with a drawing in B_j
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures
from ldm.metric._neighbours import CHUNK, both, radii


class DensityCoverage(OfFeatures):
    """Density and coverage of an extractor's features.

    Between equal distributions, for many pictures of each, the expected density is 1 and the expected coverage 1 - 2^-k. One
    outlier among the real pictures counts for little, unlike in precision and recall.

    Args:
        extractor: makes the network whose features are compared.
        k: which neighbour a ball reaches to, at least 1.
        **features: weights, of and against, as in _features.py.
    """

    def __init__(self, extractor: Callable[..., Extractor], k: int = 5, **features: Any) -> None:
        super().__init__(extractor, **features)
        self.k = k

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
