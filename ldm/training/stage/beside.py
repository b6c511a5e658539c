"""A second optimizer, stepped with the main one: Lightning knows only that, so that a step is one of its updates on every axis.

Its weights take no gradient elsewhere: neither DDP, nor averages, nor the main optimizer see them.
"""

from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from ldm.files.lightning import scaler_of
from ldm.training.base import clip, reduce_sum
from ldm.training.callback.guard import skip_where


def add_gradients(loss: Tensor, parameters: Sequence[nn.Parameter], trainer: pl.Trainer) -> None:
    """Adds a micro-batch's gradients, of these weights alone; the loss' graph stays for others."""
    scaler = scaler_of(trainer)
    share = loss / trainer.accumulate_grad_batches
    share = share if scaler is None else scaler.scale(share)
    for p, gradient in zip(parameters, torch.autograd.grad(share, parameters, retain_graph=True, allow_unused=True)):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad + gradient


def step_beside(
    optimizer: Optimizer,
    rates: Sequence[float],
    rate: Callable[[int], float],
    trainer: pl.Trainer,
    spoilt: Tensor | None = None,
) -> None:
    """One update from the gradients of all ranks; left out where its own gradient is not finite.

    Args:
        optimizer: whose weights' gradients are taken, and zeroed.
        rates: its groups' learning rates.
        rate: the main step -> what they are multiplied by.
        trainer: says how gradients are clipped.
        spoilt: () bool, whether the main update is left out; then this one is, too.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return
    gradients = parameters_to_vector(p.grad.contiguous() for p in parameters)
    gradients = reduce_sum(gradients) / trainer.world_size
    vector_to_parameters(gradients, [p.grad for p in parameters])
    if spoilt is not None:
        skip_where(optimizer, spoilt | ~gradients.norm().isfinite())
    for group, usual in zip(optimizer.param_groups, rates):
        group["lr"] = usual * rate(trainer.global_step)
    scaler = scaler_of(trainer)
    if scaler is not None:
        scaler.unscale_(optimizer)
    clip(trainer, optimizer)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    optimizer.zero_grad()
