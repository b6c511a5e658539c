"""Muon: momentum whose matrices are made orthogonal, for the hidden layers; AdamW for all the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

TOGETHER = 2**22  # numbers, beyond which a product keeps a device busy by itself


class Muon(Optimizer):
    """Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon), with AdamW where it does not apply.

    A weight counts as a matrix (outputs, inputs * kernel). Those that are large enough get Muon, the others (first and last
    layers, norms, biases) AdamW; a learning-rate schedule moves both alike. torch.optim.Muon takes 2-D weights only, which leaves
    out convolutions.

    Args:
        params: weights, or groups of them.
        lr: of Muon.
        adam_lr: of AdamW.
        momentum: of Muon.
        betas, eps: of AdamW.
        weight_decay: of both, times the group's rate.
        least: outputs and inputs that a weight must have at least to be one of Muon's matrices.
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
        alike: dict[Any, list[nn.Parameter]] = {}
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
        for same in alike.values():
            most = max(TOGETHER // same[0].numel(), 1)
            for first in range(0, len(same), most):
                self._turn(same[first : first + most], group)

    def _turn(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Moves weights of one shape, (M, ...) each: their products of matrices are made together."""
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])).flatten(2)
        scale = max(1.0, ahead.shape[1] / ahead.shape[2]) ** 0.5
        moves = [move.reshape(p.shape) for move, p in zip(orthogonal(ahead), params)]
        torch._foreach_add_(params, moves, alpha=-group["lr"] * scale)

    def _adam(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        (beta1, beta2), eps, states = group["betas"], group["eps"], [self.state[p] for p in params]
        for p, state in zip(params, states):
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
        if not params:
            return
        grads, means, squares = [p.grad for p in params], [s["mean"] for s in states], [s["square"] for s in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        lengths = torch._foreach_div(squares, [1 - beta2 ** s["step"] for s in states])
        torch._foreach_sqrt_(lengths)
        torch._foreach_add_(lengths, eps)
        torch._foreach_addcdiv_(params, means, lengths, [-group["lr"] / (1 - beta1 ** s["step"]) for s in states])


def orthogonal(matrix: Tensor) -> Tensor:
    """(..., M, N) -> (..., M, N), all singular values near 1 and the same singular vectors (Newton-Schulz, quintic).

    Five steps, X <- (a + F) X with F = b S + c S^2 and S = X X^T. Where X is wide, only S and the product of the steps'
    factors, `scale` + `rest`, are carried on within a round, which are small; S of X anew in each round keeps the rounding small.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.flatten(end_dim=-3) if matrix.ndim > 2 else matrix[None]
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for steps in (2, 3) if x.shape[-1] > 2 * x.shape[-2] else (1,) * 5:
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        scale, rest = a, factor
        for _ in range(1, steps):
            square = torch.baddbmm(square, factor, square, beta=a)
            square = torch.baddbmm(square, square, factor, beta=a)
            factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
            rest = torch.baddbmm(rest, factor, rest, beta=a).add_(factor, alpha=scale)
            scale *= a
        x = torch.baddbmm(x, rest, x, beta=scale)
    return (x.mT if tall else x).reshape(matrix.shape)
