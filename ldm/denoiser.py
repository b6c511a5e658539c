"""The denoiser, the only place where a network's output becomes an estimate of the data.

x_hat = D(x_t, t, c) = to_data(F(x_t / sqrt(alpha_t^2 + sigma_t^2), level(t), c), x_t, alpha_t, sigma_t)

F is the backbone, `to_data` the prediction's (prediction.py), alpha and sigma the schedule's (schedule.py), c the condition. This
is EDM's preconditioning (https://arxiv.org/abs/2206.00364, equation 7), with c_skip and c_out read off the prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.nn.sinusoid import sinusoid
from ldm.types import Backbone, Cond, Prediction, Schedule, like


@runtime_checkable
class Terminal(Protocol):
    """A schedule that may leave no signal at t = 1."""

    zero_terminal_snr: bool


@dataclass(frozen=True)
class LogRatio:
    """The noise level as scale * log(sigma / alpha), half the negative log-SNR: it means the same under any schedule.

    scale: brings it to the range of the sinusoids (nn/sinusoid.py): -345 to 345 for schedule=linear.
    """

    scale: float = 50.0

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*)."""
        return self.scale * (sigma / alpha).log()


@dataclass(frozen=True)
class Timestep:
    """The noise level as a discrete step, steps * t - 1, as Stable Diffusion 1, 2, XL and DiT read it.

    steps: of the published table of betas.
    """

    steps: int = 1000

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*)."""
        return self.steps * t - 1


@dataclass(frozen=True)
class DataTime:
    """The noise level as the share of data, alpha / (alpha + sigma): time from noise to data, as SiT's weights read it."""

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*) in [0, 1]."""
        return alpha / (alpha + sigma)


@dataclass(frozen=True)
class NoiseTime:
    """The noise level as the share of noise, steps * sigma / (alpha + sigma), as Stable Diffusion 3 and Flux read it.

    steps: what it is multiplied by: 1000 for both.
    """

    steps: int = 1000

    def __call__(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """t, alpha, sigma: (*) -> (*) in [0, steps]."""
        return self.steps * sigma / (alpha + sigma)


class Denoiser(nn.Module):
    """x_hat = D(x_t, t, cond). The backbone never learns which schedule or prediction is in use.

    A flow map (`span` > 0) has a second time, `to`: the network reads how far it goes, level(t) - level(to), and x_hat is the
    point for which x_to = alpha_to x_hat + sigma_to (x_t - alpha_t x_hat) / sigma_t is where the flow from x_t is at `to`
    (MeanFlow, https://arxiv.org/abs/2505.13447, equation 12). Without `to` it goes nowhere, and x_hat is the plain estimate.

    Args:
        backbone: the network, (x: (B, C + C', H, W), noise level: (B), Cond) -> (B, C, H, W).
        schedule: t -> (alpha, sigma).
        prediction: what the network's output means.
        level: (t, alpha, sigma), (*) each -> the noise level that the network reads, (*).
        unit_input: whether the network sees x_t / sqrt(alpha^2 + sigma^2), of unit variance; for variance-preserving schedules
            it makes no difference.
        span: sinusoidal features of a flow map's second time, which join the conditions' vector in front; 0 for a plain denoiser.

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
        """x_t: (B, C, H, W), t and to: () or (B) in [0, 1] -> x_hat: (B, C, H, W).

        Raises:
            Refusal: as `output`.
        """
        alpha, sigma = (like(s, x_t) for s in self.schedule(t))
        return self.prediction.to_data(self.output(x_t, t, cond, to), x_t, alpha, sigma)

    def output(self, x_t: Tensor, t: Tensor, cond: Cond, to: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t and to: () or (B) in [0, 1] -> the network's output, before `to_data`: (B, C, H, W).

        Raises:
            Refusal: `to` for a network that reads one time, or maps of another size than the latents.
        """
        alpha, sigma = self.schedule(t)
        x = x_t / like(torch.hypot(alpha, sigma), x_t) if self.unit_input else x_t
        x = x if cond.spatial is None else torch.cat((x, _fitting(cond.spatial, x)), dim=1)
        level = self.level(t, alpha, sigma).to(x_t, non_blocking=True).expand(len(x_t))
        if self.span:
            cond = Cond(vector=self._distance(level, to)) + cond  # in front: Flux finds its guidance at the end
        elif to is not None:
            raise Refusal(
                "This model knows one time, and was asked to go to a second one: sampler=flow_map draws from flow maps "
                "(objective=mean_flow); such a model is trained with model.span=64, the width of the second time's features."
            )
        return self.backbone(x, level, cond).to(x_t)

    def _distance(self, level: Tensor, to: Tensor | None) -> Tensor:
        """level: (B), to: () or (B) -> sinusoids of how far the flow map goes, (B, span)."""
        if to is None:
            return sinusoid(0 * level, self.span).to(level)
        level_to = self.level(to, *self.schedule(to)).to(level, non_blocking=True).expand(len(level))
        return sinusoid(level - level_to, self.span).to(level)


def _fitting(maps: Tensor, x: Tensor) -> Tensor:
    """The conditions' maps, (B, C', H, W), in x's dtype and on its device."""
    if maps.shape[2:] != x.shape[2:]:
        raise Refusal(
            f"The condition's maps are of {tuple(maps.shape[2:])} latent pixels, the latents of {tuple(x.shape[2:])}; give both "
            "one size (data.size, or resolution= and the files of ask.*)."
        )
    return maps.to(x)


def _check_terminal(schedule: Schedule, prediction: Prediction) -> None:
    """Refuses a prediction that divides by alpha where a schedule leaves none of it."""
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
