"""Whether a drawing looks like the class that was asked for, by a classifier fitted to the training pictures."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ldm.errors import Refusal
from ldm.measure import Estimate, Extractor, Reference, Rows
from ldm.metric._features import OfFeatures
from ldm.types import Batch


class ClassAccuracy(OfFeatures):
    """Top-1 accuracy of a linear classifier on an extractor's features: ridge regression onto the classes of the training set.

    W = (X^T X + lambda I)^-1 X^T Y, with lambda = ridge * N * the features' mean variance, and no penalty on the bias. `key` is
    the field that holds the class. `right` holds the answers, picture by picture.
    """

    def __init__(
        self, extractor: Callable[..., Extractor], weights: str | None = None, key: str = "label", ridge: float = 0.1
    ) -> None:
        super().__init__(extractor, weights, against="train")
        self.key, self.ridge = key, ridge
        self.protocol = {**self.extractor.protocol, "class": key}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: the class, (B) -> features: (B, D), label: (B).

        Raises:
            Refusal: the requests have no class.
        """
        if self.key not in batch:
            raise Refusal(
                f"class_accuracy reads the field `{self.key}`, and there is only {sorted(batch)}: +data.fields.{self.key}=cls"
            )
        return {"features": self.extractor(images)["features"], "label": torch.as_tensor(batch[self.key])}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `class_accuracy` of the drawings, and `class_accuracy_real` of the training pictures, in [0, 1].

        Each training picture is judged by the fit without it: its residual is that of the fit to all, over 1 - its leverage.
        """
        real = reference.rows()
        classes = int(torch.cat((real["label"], rows["label"])).max()) + 1
        x, y = real["features"].double(), one_hot(real["label"], classes).double()
        mean = x.mean(0)
        x = torch.cat((x - mean, torch.ones(len(x), 1, dtype=x.dtype)), 1)
        penalty = self.ridge * x[:, :-1].square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        penalty[-1, -1] = 0
        inverse = torch.linalg.inv(x.T @ x + penalty)
        fit = inverse @ x.T @ y
        leverage = (x @ inverse * x).sum(1, keepdim=True)
        left_out = (x @ fit - leverage * y) / (1 - leverage).clamp(min=1e-9)
        drawn = torch.cat((rows["features"].double() - mean, torch.ones(len(rows["label"]), 1, dtype=x.dtype)), 1)
        self.right = (drawn @ fit).argmax(1) == rows["label"]
        right_real = left_out.argmax(1) == real["label"]
        return {"class_accuracy": Estimate.mean(self.right), "class_accuracy_real": Estimate.mean(right_real)}
