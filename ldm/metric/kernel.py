"""Kernel distance between two sets of pictures: KID with Inception. It is unbiased, so that few pictures suffice.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = (x . y / D + 1)^3  (https://arxiv.org/abs/1801.01401, section 4)
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures


class Kernel(OfFeatures):
    """The squared maximum mean discrepancy of an extractor's features, in float64: the mean over random subsets of both sets.

    Args:
        extractor: makes the network whose features are compared.
        name: what the number is called in metrics.json.
        subsets: how many are drawn, as torch-fidelity draws them.
        size: pictures of a subset; fewer where there are fewer.
        seed: of the subsets.
        **features: weights, of and against, as in _features.py.
    """

    def __init__(
        self,
        extractor: Callable[..., Extractor],
        name: str = "kid",
        subsets: int = 100,
        size: int = 1000,
        seed: int = 2020,
        **features: Any,
    ) -> None:
        super().__init__(extractor, **features)
        self.name = name
        self.subsets, self.size, self.seed = subsets, size, seed

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `kid`, which may be a little below 0, and `kid_std`, its standard deviation over the subsets.

        Raises:
            Refusal: fewer than 2 pictures.
        """
        drawn, real = rows["features"].double(), reference.rows()["features"].double()
        size = min(self.size, len(drawn), len(real))
        if size < 2:
            raise Refusal(f"A kernel distance needs at least 2 pictures of each set; found {len(drawn)} and {len(real)}.")
        note = None if size == self.size else f"subsets of {size} pictures, as there are no {self.size}."
        random = np.random.RandomState(self.seed)
        values = [
            discrepancy(
                drawn[random.choice(len(drawn), size, replace=False)], real[random.choice(len(real), size, replace=False)]
            )
            for _ in range(self.subsets)
        ]
        return {self.name: Estimate(float(np.mean(values)), note=note), f"{self.name}_std": Estimate(float(np.std(values)))}


def discrepancy(x: Tensor, y: Tensor) -> float:
    """x, y: (M, D) -> the unbiased estimate of the squared maximum mean discrepancy."""
    m, width = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1) ** 3

    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y))) / (m * (m - 1))
    return torch.as_tensor(within - 2 * kernel(x, y).mean()).item()
