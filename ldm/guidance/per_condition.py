"""Classifier-free guidance with a scale for each condition (InstructPix2Pix, https://arxiv.org/abs/2211.09800, equation 3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Batch, Cond, Denoise, Told


@dataclass(frozen=True)
class PerCondition:
    """x_hat = D() + sum over i of scale_i (D(c_1, ..., c_i) - D(c_1, ..., c_{i-1})), c_i in the order of `scales`.

    Conditions that `scales` does not name come with the last. Terms that cancel are not computed: with all scales at 1
    the network is called once a step.
    """

    scales: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, model: Told, ask: Batch) -> Denoise:
        """ask: the request's fields -> Denoise. Raises ValueError where the model has no such condition."""
        names, steps = list(self.scales), [1.0, *self.scales.values(), 0.0]
        terms = {i: a - b for i, (a, b) in enumerate(pairwise(steps)) if a != b}
        conds = [model.tell(ask, only=None if i == len(names) else names[:i]) for i in terms]
        together, weights = reduce(Cond.stack, conds), list(terms.values())

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            copies = len(weights)
            x_hat = model.denoiser(x_t.repeat(copies, 1, 1, 1), t.expand(len(x_t)).repeat(copies), together)
            return torch.stack([w * x for w, x in zip(weights, x_hat.chunk(copies))]).sum(0)

        return denoise
