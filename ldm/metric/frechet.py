"""Fréchet distance between two sets of pictures: FID with Inception, FD-DINOv2 with DINOv2, rFID of reconstructions.

d^2 = ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the features' means m and covariances S
(https://arxiv.org/abs/1706.08500, equation 6)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Published, Reference, Rows
from ldm.metric._features import OfFeatures


class Frechet(OfFeatures):
    """The Fréchet distance of an extractor's features, in float64.

    Args:
        extractor: makes the network whose features are compared.
        name: what the number is called in metrics.json.
        **features: weights, of and against, as in _features.py.
    """

    def __init__(self, extractor: Callable[..., Extractor], name: str = "fid", **features: Any) -> None:
        super().__init__(extractor, **features)
        self.name = name

    def knows(self, statistics: str) -> bool:
        """Whether published statistics, such as `inception`, are of this extractor's features."""
        return isinstance(self.extractor, Published) and self.extractor.statistics == statistics

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> the distance, at least 0; with a note where the features' covariance cannot be known from so few pictures.

        Raises:
            Refusal: features or statistics that are not finite, or of another extractor.
        """
        drawn, real = moments(rows), reference.kept("moments", moments)
        count, width = rows["features"].shape
        note = None
        if count <= width:
            note = (
                f"{count} pictures cannot tell the covariance of {width} features (rank {count - 1}): compare it only with "
                f"numbers from {count} pictures. Draw more than {width}, 10,000 or more to be comparable, or use metric=[kernel]."
            )
        return {self.name: Estimate(frechet(drawn["mean"], drawn["covariance"], real["mean"], real["covariance"]), note=note)}


def moments(rows: Rows) -> Rows:
    """features: (N, D) -> mean: (D), covariance: (D, D), unbiased, in float64.

    Raises:
        Refusal: N < 2.
    """
    features = rows["features"].double()
    if len(features) < 2:
        raise Refusal(f"A Fréchet distance needs at least 2 pictures, better 10,000; found {len(features)} (count=...).")
    return {"mean": features.mean(0), "covariance": features.T.cov()}


def frechet(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """(D), (D, D), (D), (D, D) in float64 -> the distance.

    tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: no complex
    roots, and none that fail.

    Raises:
        Refusal: the widths differ, or a number is not finite.
    """
    if mean1.shape != mean2.shape:
        raise Refusal(f"Features are {len(mean1)} wide, the reference's {len(mean2)}: its statistics are of another extractor.")
    for what, value in {"the pictures'": (mean1, covariance1), "the reference's": (mean2, covariance2)}.items():
        if not all(v.isfinite().all() for v in value):
            raise Refusal(
                f"NaN or infinity among {what} features, so there is no Fréchet distance. Pictures that are NaN come of a "
                "diverged model or of precision=16; statistics that are NaN come of a broken file."
            )
    root = _root(covariance1)
    values = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0)
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * values.sqrt().sum()
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-6 * values[-1].abs():
        raise Refusal(f"A covariance has the eigenvalue {values[0]:.3g} (largest {values[-1]:.3g}): the statistics are damaged.")
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
