"""Contrastive flow matching (https://arxiv.org/abs/2506.05350, equation 5): near one's own target, and away from another's."""

from collections.abc import Callable

from torch import Tensor, nn

from ldm.objective._together import together
from ldm.objective.regression import LOGIT_NORMAL, NORMAL, PLAIN, SQUARE, Regression
from ldm.types import Batch, Cond, Draw, InTraining, Schedule, like


class Contrastive(nn.Module):
    """E weight(t) (distance(output - target) - away distance(output - other's target)), the other the batch's next.

    Its best answer is the plain one less `away` of the mean target, divided by 1 - away: conditions differ more. The parts are
    as in regression; any prediction goes with it. `away` = 0.05 is the paper's.
    """

    def __init__(
        self,
        time: Callable[[Tensor, Schedule], Tensor] = LOGIT_NORMAL,
        weight: Callable[[Tensor, Tensor, Tensor], Tensor] = PLAIN,
        noise: Callable[[Draw, Tensor], Tensor] = NORMAL,
        distance: Callable[[Tensor], Tensor] = SQUARE,
        away: float = 0.05,
    ) -> None:
        super().__init__()
        self.regression, self.away = Regression(time, weight, noise, distance), away

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": (), "regression": (), "contrast": ()}: loss = regression - away contrast."""
        denoiser, part = model.denoiser, self.regression
        t = part.time_for(x)(draw.stratified("time"), denoiser.schedule).to(x, non_blocking=True)
        noise = part.noise(draw, x)
        alpha, sigma = (like(s, x) for s in denoiser.schedule(t))
        output = denoiser.output(alpha * x + sigma * noise, t, cond)
        (all_x, all_noise), place = together(draw.position, x, noise)
        other_x, other_noise = (value.roll(-1, 0)[place] for value in (all_x, all_noise))
        targets = [denoiser.prediction.target(*pair, alpha, sigma) for pair in ((x, noise), (other_x, other_noise))]
        near, far = (part.error(denoiser, output - target, t).mean() for target in targets)
        return {"loss": near - self.away * far, "regression": near, "contrast": far}
