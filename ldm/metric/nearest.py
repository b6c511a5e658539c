"""The training pictures nearest to the drawings: does the model draw, or remember?"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures

CHUNK = 1000  # rows of a block of similarities
SHOWN = 16  # pairs in the picture


class Nearest(OfFeatures):
    """Nearest neighbours by the cosine of an extractor's features.

    Authenticity (https://arxiv.org/abs/2102.08921, section 3.3) is the share of drawings that lie farther from their nearest
    training picture than that one lies from its nearest: 0 where all are copies, about 1/2 for new pictures of the same
    distribution. `number` and `similarity` hold each drawing's nearest training picture and its cosine. `extractor` makes the
    network, `weights` are its published name or a local file.
    """

    def __init__(self, extractor: Callable[..., Extractor], weights: str | None = None) -> None:
        super().__init__(extractor, weights, against="train")

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `nearest_similarity`, a mean cosine, and `authenticity`, a share in [0, 1]."""
        known = reference.rows()
        drawn, real = (normalize(x["features"].double(), dim=1) for x in (rows, known))
        self.similarity, place = nearest(drawn, real)
        self.number, self.drawn = known["number"][place], rows["number"]
        among, _ = nearest(real, real, same=True)
        authentic = self.similarity < among[place]
        return {"nearest_similarity": Estimate.mean(self.similarity), "authenticity": Estimate.mean(authentic)}

    def show(self, pictures: Callable[[Sequence[int]], Tensor], real: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Pictures by number, (B, 3, h, w) -> (2 B, 3, h, w): drawings above their nearest, the most alike first."""
        place = self.similarity.argsort(descending=True)[:SHOWN]
        drawn, copied = pictures(self.drawn[place].tolist()), real(self.number[place].tolist())
        return torch.cat((drawn.cpu(), interpolate(copied.cpu(), drawn.shape[2:])))


def nearest(points: Tensor, x: Tensor, same: bool = False) -> tuple[Tensor, Tensor]:
    """points: (M, D), x: (N, D), of unit length -> the cosine with the nearest row of x, (M), and that row's number, (M).

    With `same`, `points` is `x`, and no point is its own neighbour.
    """
    best = []
    for start in range(0, len(points), CHUNK):
        cosine = points[start : start + CHUNK] @ x.T
        if same:
            cosine.diagonal(start).fill_(-2)
        best.append(cosine.max(dim=1))
    return torch.cat([f.values for f in best]), torch.cat([f.indices for f in best])
