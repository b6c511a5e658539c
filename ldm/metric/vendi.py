"""How many different pictures there are: the Vendi score.

VS = exp(-sum_i l_i log l_i), l_i the eigenvalues of K / N, K the N pictures' cosine similarities
(https://arxiv.org/abs/2210.02410, equation 2)
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.types import Batch


class Vendi:
    """The Vendi score of an extractor's features: 1 for N copies of one picture, N for N orthogonal ones.

    It sees the judged pictures alone, grows with their number, and says nothing of how good they are. `extractor` makes the
    network, `weights` are its published name or a local file, `of` is `drawing` or `reconstruction`.
    """

    against = None

    def __init__(self, extractor: Callable[..., Extractor], weights: str | None = None, of: str = "drawing") -> None:
        self.extractor = extractor() if weights is None else extractor(weights=weights)
        self.of, self.protocol = of, self.extractor.protocol

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> what the extractor sees."""
        return self.extractor(images)

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `vendi`, from 1 to the number of pictures."""
        x = normalize(rows["features"].double(), dim=1) / len(rows["features"]) ** 0.5
        share = torch.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x).clamp(min=0)  # both have the same ones
        return {"vendi": Estimate(torch.special.entr(share).sum().exp().item())}
