"""Maximum mean discrepancy with a Gaussian kernel: CMMD with CLIP (https://arxiv.org/abs/2401.09603), and the same in DINOv2.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = exp(-||x - y||^2 / (2 sigma^2)),  x and y of unit length
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.types import Batch

CHUNK = 1000  # rows of a block of the kernel


class MMD:
    """scale * MMD^2 of an extractor's features, in float64, over all pairs, those of a picture with itself included.

    It assumes no normal distribution, and needs fewer pictures than FID.

    Args:
        extractor: makes the network whose features are compared.
        weights: of the extractor, a published name or a local file; None for its own default.
        name: what the number is called in metrics.json.
        of: which pictures are judged, `drawing` or `reconstruction`.
        against: which real pictures they are compared with, `reference` or `train`.
        sigma: of the kernel; 10 is CMMD's.
        scale: what MMD^2 is multiplied by; 1000 is CMMD's.
    """

    def __init__(
        self,
        extractor: Callable[..., Extractor],
        weights: str | None = None,
        name: str = "cmmd",
        of: str = "drawing",
        against: str = "reference",
        sigma: float = 10.0,
        scale: float = 1000.0,
    ) -> None:
        self.extractor = extractor() if weights is None else extractor(weights=weights)
        self.name, self.of, self.against, self.protocol = name, of, against, self.extractor.protocol
        self.sigma, self.scale = sigma, scale

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> what the extractor sees."""
        return self.extractor(images)

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
