"""How many different pictures there are: the Vendi score.

VS = exp(-sum_i l_i log l_i), l_i the eigenvalues of K / N, K the N pictures' cosine similarities
(https://arxiv.org/abs/2210.02410, equation 2)
"""

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import normalize

from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures


class Vendi(OfFeatures):
    """The Vendi score of an extractor's features: 1 for N copies of one picture, N for N orthogonal ones.

    It sees the judged pictures alone, grows with their number, and says nothing of how good they are. `extractor` makes the
    network, `weights` are its published name or a local file, `of` is `drawing` or `reconstruction`.
    """

    def __init__(self, extractor: Callable[..., Extractor], weights: str | None = None, of: str = "drawing") -> None:
        super().__init__(extractor, weights, of, against=None)

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `vendi`, from 1 to the number of pictures."""
        x = normalize(rows["features"].double(), dim=1) / len(rows["features"]) ** 0.5
        share = torch.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x).clamp(min=0)  # both have the same ones
        return {"vendi": Estimate(torch.special.entr(share).sum().exp().item())}
