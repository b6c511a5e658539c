"""The only place where a network's output becomes an estimate of the data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.nn.sinusoid import sinusoid
from ldm.types import Backbone, Cond, Prediction, Schedule, Terminal, like


@dataclass(frozen=True)
class LogRatio:
    """The noise level as scale * log(sigma / alpha): what a network is told stays the same under any schedule."""

    scale: float = 50.0

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*)."""
        return self.scale * (sigma / alpha).log()


@dataclass(frozen=True)
class Timestep:
    """The noise level as a discrete step, steps * t - 1: how published weights are told."""

    steps: int = 1000

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*)."""
        return self.steps * t - 1


@dataclass(frozen=True)
class DataTime:
    """The noise level as the share of data, alpha / (alpha + sigma): time from noise to data, as SiT's weights are told."""

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*) in [0, 1]."""
        return alpha / (alpha + sigma)


@dataclass(frozen=True)
class NoiseTime:
    """The noise level as the share of noise, steps * sigma / (alpha + sigma): how Stable Diffusion 3 and Flux are told."""

    steps: int = 1000

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*) in [0, steps]."""
        return self.steps * sigma / (alpha + sigma)


class Denoiser(nn.Module):
    """x_hat = D(x_t, t, cond). The backbone never learns which schedule or prediction is in use.

    `level` tells the noise level. With `unit_input` the network sees x_t / sqrt(alpha^2 + sigma^2), of unit variance
    (the published variance-preserving networks are the same with either).

    `span` > 0 makes it a flow map, which has a second time: the network is told how far it goes, level(t) - level(to), as so
    many sinusoidal features that join the conditions' vector; without `to` it stays, and x_hat is the plain estimate. The line
    from x_t through x_hat is where the flow from t is at `to`: x_to = alpha_to x_hat + sigma_to (x_t - alpha x_hat) / sigma.

    Raises:
        Refusal: the prediction cannot be read where the schedule ends: noise, at zero terminal SNR.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        prediction: Prediction,
        level: Callable[[Tensor, Tensor, Tensor], Tensor],
        unit_input: bool = True,
        span: int = 0,
    ) -> None:
        super().__init__()
        _check_terminal(schedule, prediction)
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction
        self.level, self.unit_input, self.span = level, unit_input, span

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, to: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t and to: () or (B) -> x_hat: (B, C, H, W)."""
        alpha, sigma = (like(s, x_t) for s in self.schedule(t))
        return self.prediction.to_data(self.output(x_t, t, cond, to), x_t, alpha, sigma)

    def output(self, x_t: Tensor, t: Tensor, cond: Cond, to: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t and to: () or (B) -> the network's own output: (B, C, H, W).

        Raises:
            Refusal: `to` for a network that knows one time.
        """
        alpha, sigma = self.schedule(t)
        x = x_t / like(torch.hypot(alpha, sigma), x_t) if self.unit_input else x_t
        x = x if cond.spatial is None else torch.cat((x, _fitting(cond.spatial, x)), dim=1)
        level = self.level(t, alpha, sigma).to(x_t, non_blocking=True).expand(len(x_t))
        if self.span:
            cond = Cond(vector=self._way(level, to)) + cond  # in front: Flux finds its guidance at the end
        elif to is not None:
            raise Refusal(
                "This model knows one time, and was asked to go to a second one: sampler=flow_map draws from flow maps "
                "(objective=mean_flow); such a model is trained with model.span=64, the width of what it is told of the second."
            )
        return self.backbone(x, level, cond).to(x_t)

    def _way(self, level: Tensor, to: Tensor | None) -> Tensor:
        if to is None:
            return sinusoid(0 * level, self.span).to(level)
        there = self.level(to, *self.schedule(to)).to(level, non_blocking=True).expand(len(level))
        return sinusoid(level - there, self.span).to(level)


def _fitting(maps: Tensor, x: Tensor) -> Tensor:
    if maps.shape[2:] != x.shape[2:]:
        raise Refusal(
            f"The condition's maps are of {tuple(maps.shape[2:])} latent pixels, the latents of {tuple(x.shape[2:])}; give both "
            "one size (data.size, or size= and the files of ask.*)."
        )
    return maps.to(x)


def _check_terminal(schedule: Schedule, prediction: Prediction) -> None:
    if not (isinstance(schedule, Terminal) and schedule.zero_terminal_snr):
        return
    one = torch.ones((), dtype=torch.float64)
    alpha, sigma = schedule(one)
    gain = prediction.to_data(one, 0 * one, alpha, sigma).abs()  # of the network's errors, on their way to x_hat
    if gain > 1000:
        raise Refusal(
            f"prediction={type(prediction).__name__.lower()} with zero terminal SNR (schedule={type(schedule).__name__}): no "
            f"signal is left at t = 1, and the network's errors would be {gain:.0f} times as large in the picture. Use "
            "prediction=velocity, flow or data, or schedule.zero_terminal_snr=false."
        )
