"""The base of metrics that compare an extractor's features."""

from collections.abc import Callable

from torch import Tensor

from ldm.measure import Extractor, Rows
from ldm.types import Batch


class OfFeatures:
    """A metric that looks at pictures through an extractor.

    Args:
        extractor: makes the network whose features are compared.
        weights: of the extractor, a published name or a local file; None for its own default.
        of: which pictures are judged, `drawing` or `reconstruction`.
        against: which real pictures they are compared with, `reference` or `train`; None for none.
    """

    def __init__(
        self,
        extractor: Callable[..., Extractor],
        weights: str | None = None,
        of: str = "drawing",
        against: str | None = "reference",
    ) -> None:
        self.extractor = extractor() if weights is None else extractor(weights=weights)
        self.of, self.against, self.protocol = of, against, self.extractor.protocol

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> what the extractor sees."""
        return self.extractor(images)
