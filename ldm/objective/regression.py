"""Regression on the prediction's target: DDPM, v-prediction, EDM and flow matching at once."""

from collections.abc import Callable

from torch import Tensor, nn

from ldm.objective.distance import Square
from ldm.objective.noise import Normal
from ldm.objective.time import LogitNormal, Sized
from ldm.objective.weight import Plain
from ldm.types import Batch, Cond, Denoiser, Draw, InTraining, Schedule, like

PLAIN, NORMAL, SQUARE, LOGIT_NORMAL = Plain(), Normal(), Square(), LogitNormal()


class Regression(nn.Module):
    """E_t weight(t) distance(output - target), with t drawn by `time` and x_t made with `noise`.

    Objectives that compare the network's output with another target inherit these four parts, and what is computed of them.

    Args:
        time: numbers in [0, 1), (B), one in each of B equal intervals, and the schedule -> times in [0, 1]: (B).
        weight: alpha, sigma and the prediction's gain, (B, 1, 1, 1) each -> how much each sample counts (weight.py).
        noise: the step's random numbers and x: (B, C, H, W) -> noise of x's shape, unit normal or nearly so.
        distance: an error, (B, C, H, W) -> what it costs at each place, of the same shape.
    """

    def __init__(
        self,
        time: Callable[[Tensor, Schedule], Tensor] = LOGIT_NORMAL,
        weight: Callable[[Tensor, Tensor, Tensor], Tensor] = PLAIN,
        noise: Callable[[Draw, Tensor], Tensor] = NORMAL,
        distance: Callable[[Tensor], Tensor] = SQUARE,
    ) -> None:
        super().__init__()
        self.time, self.weight, self.noise, self.distance = time, weight, noise, distance

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": ()}."""
        return {"loss": self.each(model.denoiser, x, cond, draw)[0].mean()}

    def each(self, denoiser: Denoiser, x: Tensor, cond: Cond, draw: Draw, region: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> each sample's weighted loss: (B), and its log(sigma / alpha): (B).

        Args:
            denoiser: what is trained.
            x, cond: (B, C, H, W) clean latents, and their condition.
            draw: the random numbers of this step.
            region: (B, 1, H, W), how much each place counts; None: all alike.
        """
        t, noise, alpha, sigma = self.drawn(x, denoiser.schedule, draw)
        output = denoiser.output(alpha * x + sigma * noise, t, cond)
        target = denoiser.prediction.target(x, noise, alpha, sigma)
        return self.error(denoiser, output - target, t, region), (sigma / alpha).log().flatten()

    def drawn(self, x: Tensor, schedule: Schedule, draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: (B, C, H, W) clean latents -> t: (B), noise: (B, C, H, W), alpha and sigma: (B, 1, 1, 1), of this step."""
        t = self.time_for(x)(draw.stratified("time"), schedule).to(x, non_blocking=True)
        return t, self.noise(draw, x), *(like(s, x) for s in schedule(t))

    def time_for(self, x: Tensor) -> Callable[[Tensor, Schedule], Tensor]:
        """x: (B, C, H, W) -> the times for latents of its size."""
        return self.time.sized(*x.shape[2:]) if isinstance(self.time, Sized) else self.time

    def error(self, denoiser: Denoiser, error: Tensor, t: Tensor, region: Tensor | None = None) -> Tensor:
        """error: (B, C, H, W), of the network's output at t: (B) -> each sample's weighted distance: (B).

        region: (B, 1, H, W), how much each place counts; None: all alike.
        """
        alpha, sigma = (like(s, error) for s in denoiser.schedule(t))
        gain = denoiser.prediction.to_data(alpha / alpha, 0 * alpha, alpha, sigma).abs()
        distance = self.distance(error) if region is None else self.distance(error) * region
        return self.weight(alpha, sigma, gain).flatten() * distance.flatten(1).mean(1)
