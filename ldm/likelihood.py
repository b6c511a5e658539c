"""The likelihood that a denoiser gives to data, by the probability-flow ODE (https://arxiv.org/abs/2011.13456, section 4.3)."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Denoise, Schedule


def log_likelihood(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, probe: Tensor) -> Tensor:
    """x: (B, C, H, W) latents at times[0], the data; times rising to the noise -> log p(x): (B), in nats.

    With y = x / alpha and r = sigma / alpha the ODE is dy/dr = (y - x_hat) / r, stepped by Heun's method (two calls a step); its
    divergence is the Hutchinson estimate of one probe, (B, C, H, W) of +1 and -1, exact where the Jacobian is diagonal.
    In bits per dimension it is -log p(x) / (C H W log 2).
    """
    alpha, _ = schedule(times[0].double().cpu())
    y, size = x / alpha, x[0].numel()
    gained = -size * torch.log(alpha) * torch.ones(len(x), dtype=x.dtype, device=x.device)
    for t, s in pairwise(times.double().cpu()):
        h = _ratio(schedule, s) - _ratio(schedule, t)
        slope_t, divergence_t = _flow(denoise, schedule, y, t, probe)
        slope_s, divergence_s = _flow(denoise, schedule, y + h * slope_t, s, probe)
        y = y + h * (slope_t + slope_s) / 2
        gained = gained + h * (divergence_t + divergence_s) / 2
    variance = 1 + _ratio(schedule, times[-1].double().cpu()) ** 2  # of y, as samplers start
    return gained - (y.square().flatten(1).sum(1) / variance + size * torch.log(2 * math.pi * variance)) / 2


def _ratio(schedule: Schedule, t: Tensor) -> Tensor:
    alpha, sigma = schedule(t)
    return sigma / alpha


def _flow(denoise: Denoise, schedule: Schedule, y: Tensor, t: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """y: (B, C, H, W) -> dy/dr: (B, C, H, W), and its divergence: (B)."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        slope = (y - denoise(schedule(t)[0] * y, t)) / _ratio(schedule, t)
        (grad,) = torch.autograd.grad((slope * probe).sum(), y)
    return slope.detach(), (grad * probe).flatten(1).sum(1)
