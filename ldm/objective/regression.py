"""Plain regression on the prediction's target: DDPM, v-prediction, EDM and flow matching at once."""

from collections.abc import Callable

from torch import Tensor, nn

from ldm.types import Cond, Denoiser, Draw, like


class Regression(nn.Module):
    """E_t || output - target ||^2, with t drawn by `time`."""

    def __init__(self, time: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.time = time

    def forward(self, denoiser: Denoiser, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> {"loss": ()}."""
        t = self.time(draw.stratified("time")).to(x)
        noise = draw.normal("noise", x.shape[1:]).to(x)
        alpha, sigma = (like(s, x) for s in denoiser.schedule(t))
        output = denoiser.output(alpha * x + sigma * noise, t, cond)
        target = denoiser.prediction.target(x, noise, alpha, sigma)
        return {"loss": (output - target).square().mean()}
