"""A coordinate check: how large hidden states are, and how far some steps move them, at several widths (2203.03466, figure 5)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.base import Stage
from ldm.training.optimizer.groups import parameter_groups
from ldm.types import Batch, Draw

STEPS = 4


def coordinates(stage: Stage, network: nn.Module, batch: Batch) -> dict[str, list[float]]:
    """Trains a stage for STEPS steps on one batch, at its full rate -> by block and `output`, sizes after each step: 1 + STEPS.

    The first is the mean absolute value of the network's hidden states at the start, the others those of their changes since.
    """
    heard: dict[str, Tensor] = {}
    named = {f"block {i}": block for i, block in enumerate(network.blocks, 1)} | {"output": network}
    hooks = [module.register_forward_hook(_ear(name, heard)) for name, module in named.items()]
    optimizer = stage.optimizer(parameter_groups(stage.named_parameters(), stage.groups, stage.scales()))
    for group in optimizer.param_groups:
        group["lr"] *= group["scale"]
    first: dict[str, Tensor] = {}
    sizes: dict[str, list[float]] = {}
    for step in range(STEPS + 1):
        loss = stage.losses(batch, Draw(stage.seed, batch["position"], stage.batch))["loss"]
        for name, value in heard.items():
            moved = value - first[name] if step else value
            sizes.setdefault(name, []).append(moved.abs().mean().item())
        first = first or dict(heard)
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for hook in hooks:
        hook.remove()
    return sizes


def slopes(sizes: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Sizes by width and block -> by block, the exponent s of the last step's change ~ width^s, by least squares; 0 transfers."""
    widths = sorted(sizes)
    x = torch.tensor([math.log(width) for width in widths], dtype=torch.float64)
    last = {
        name: [sizes[width][name][-1] for width in widths] for name in sizes[widths[0]] if all(name in sizes[w] for w in widths)
    }
    return {name: _slope(x, torch.tensor(values, dtype=torch.float64).clamp(min=1e-30).log()) for name, values in last.items()}


def _slope(x: Tensor, y: Tensor) -> float:
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()


def _ear(name: str, heard: dict[str, Tensor]) -> Any:
    def hear(module: nn.Module, inputs: Any, output: Any) -> None:
        said = output[0] if isinstance(output, tuple) else output
        heard[name] = said.detach().float()

    return hear
