"""Muon: momentum whose matrices are made orthogonal, for the hidden layers; AdamW for all the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Muon(Optimizer):
    """Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon), with AdamW where it does not apply.

    A weight counts as a matrix (outputs, inputs * kernel). Those with at least `least` outputs and inputs get Muon at rate
    `lr`, the others (first and last layers, norms, biases) AdamW at rate `adam_lr`; a learning-rate schedule moves both alike.
    torch.optim.Muon takes 2-D weights only, which leaves out convolutions.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter | dict[str, Any]],
        lr: float = 0.02,
        adam_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        least: int = 16,
    ) -> None:
        given, groups = list(params), []
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            matrices, rest = [], []
            for p in group["params"]:
                hidden = p.ndim >= 2 and min(p.shape[:2]) >= least
                (matrices if hidden else rest).append(p)
            groups += [
                {**group, "params": matrices, "lr": lr, "muon": True},
                {**group, "params": rest, "lr": adam_lr, "muon": False},
            ]
        defaults = {"momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["muon"] else self._adam)(params, group)
        return loss

    def _muon(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(state["momentum"], group["momentum"])
            matrix = orthogonal(ahead.reshape(len(p), -1))
            scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            p.add_(matrix.reshape(p.shape), alpha=-group["lr"] * scale)

    def _adam(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        (beta1, beta2), eps = group["betas"], group["eps"]
        for p in params:
            state = self.state[p]
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
            p.addcdiv_(state["mean"], (state["square"] / bias2).sqrt_().add_(eps), value=-group["lr"] / bias1)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """(M, N) -> (M, N) with all singular values near 1 and the same singular vectors (Newton-Schulz, quintic)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
