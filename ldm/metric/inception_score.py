"""Inception Score: how sure Inception is of each picture, and how varied its classes are over all of them.

IS = exp E_x[KL(p(y|x) || p(y))]  (https://arxiv.org/abs/1606.03498, section 4)
"""

from collections.abc import Callable, Mapping

import numpy as np

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures


class InceptionScore(OfFeatures):
    """The mean score of `splits` random parts of the pictures.

    Their order, drawn with `seed`, and the parts are torch-fidelity's; the logits are those of the classifier without its bias.
    `extractor` makes the network, `weights` are its published name or a local file.
    """

    def __init__(
        self, extractor: Callable[..., Extractor], weights: str | None = None, splits: int = 10, seed: int = 2020
    ) -> None:
        super().__init__(extractor, weights, against=None)
        self.splits, self.seed = splits, seed

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `inception_score`, from 1 to the number of classes, and `inception_score_std`, over the parts.

        Raises:
            Refusal: an extractor without logits, or fewer pictures than parts.
        """
        if "logits" not in rows:
            raise Refusal("The Inception Score reads class logits, which this extractor does not say; use extractor=inception.")
        logits = rows["logits"].double()
        n = len(logits)
        if n < self.splits:
            raise Refusal(f"{n} pictures do not fill {self.splits} parts (metric.inception_score.splits=...).")
        logits = logits[np.random.RandomState(self.seed).permutation(n)]
        scores = []
        for i in range(self.splits):
            log_p = logits[i * n // self.splits : (i + 1) * n // self.splits].log_softmax(1)
            scores.append((log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp().item())
        note = (
            None
            if n >= 5000
            else f"{n // self.splits} pictures a part cannot show the variety of 1,008 classes; 5,000 are usual."
        )
        return {
            "inception_score": Estimate(float(np.mean(scores)), note=note),
            "inception_score_std": Estimate(float(np.std(scores))),
        }
