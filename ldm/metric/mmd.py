"""Maximum mean discrepancy with a Gaussian kernel: CMMD with CLIP (https://arxiv.org/abs/2401.09603), and the same in DINOv2.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = exp(-||x - y||^2 / (2 sigma^2)),  x and y of unit length
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures

CHUNK = 1000  # rows of a block of the kernel


class MMD(OfFeatures):
    """scale * MMD^2 of an extractor's features, in float64, over all pairs, those of a picture with itself included.

    It assumes no normal distribution, and needs fewer pictures than FID.

    Args:
        extractor: makes the network whose features are compared.
        name: what the number is called in metrics.json.
        sigma: of the kernel; 10 is CMMD's.
        scale: what MMD^2 is multiplied by; 1000 is CMMD's.
        **features: weights, of and against, as in _features.py.
    """

    def __init__(
        self,
        extractor: Callable[..., Extractor],
        name: str = "cmmd",
        sigma: float = 10.0,
        scale: float = 1000.0,
        **features: Any,
    ) -> None:
        super().__init__(extractor, **features)
        self.name = name
        self.sigma, self.scale = sigma, scale

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> the discrepancy, at least 0.

        Raises:
            Refusal: the two are of different extractors.
        """
        x, y = rows["features"], reference.rows()["features"]
        if x.shape[1] != y.shape[1]:
            raise Refusal(
                f"{self.name}: features are {x.shape[1]} wide, the reference's {y.shape[1]}: they are another extractor's."
            )
        x, y = (normalize(f.double(), dim=1) for f in (x, y))
        return {self.name: Estimate(self.scale * (self.mean(x, x) + self.mean(y, y) - 2 * self.mean(x, y)))}

    def mean(self, x: Tensor, y: Tensor) -> float:
        """x: (N, D), y: (M, D) -> the mean of the kernel over all pairs."""
        total = sum(torch.exp(-torch.cdist(part, y).square() / (2 * self.sigma**2)).sum().item() for part in x.split(CHUNK))
        return total / (len(x) * len(y))
