"""Contrastive flow matching (https://arxiv.org/abs/2506.05350, equation 5): near one's own target, and away from another's."""

from typing import Any

from torch import Tensor

from ldm.objective._together import together
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Draw, InTraining


class Contrastive(Regression):
    """E weight(t) (distance(output - target) - away distance(output - other's target)), the other the batch's next.

    Its best answer is the plain one less `away` of the mean target, divided by 1 - away: conditions differ more. The parts are
    as in regression; any prediction goes with it. `away` = 0.05 is the paper's.
    """

    def __init__(self, away: float = 0.05, **parts: Any) -> None:
        super().__init__(**parts)
        self.away = away

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": (), "regression": (), "contrast": ()}: loss = regression - away contrast."""
        denoiser = model.denoiser
        t, noise, alpha, sigma = self.drawn(x, denoiser.schedule, draw)
        output = denoiser.output(alpha * x + sigma * noise, t, cond)
        (all_x, all_noise), place = together(draw.position, x, noise)
        other_x, other_noise = (value.roll(-1, 0)[place] for value in (all_x, all_noise))
        targets = [denoiser.prediction.target(*pair, alpha, sigma) for pair in ((x, noise), (other_x, other_noise))]
        near, far = (self.error(denoiser, output - target, t).mean() for target in targets)
        return {"loss": near - self.away * far, "regression": near, "contrast": far}
