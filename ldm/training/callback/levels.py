"""The denoiser's error by noise level, on held-out data: a curve that is the same for the same weights, run by run."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ldm.training.base import reduce_sum
from ldm.types import Cond, Denoiser, Draw, like

LEVELS = (6, 4, 2, 0, -2, -4)  # log-SNR, log(alpha^2 / sigma^2)
NAME = "val/error/log_snr_{:+d}"


@torch.no_grad()
def level_errors(denoiser: Denoiser, x: Tensor, cond: Cond, draw: Draw) -> Tensor:
    """x: (B, C, H, W) clean latents -> sums of errors and numbers of samples at each level: (2, number of LEVELS).

    Sample i of the data is noised to level i modulo the number of levels, with its own noise. The error is that of the
    velocity, E ||x_hat - x||^2 (1 + SNR), whatever the network predicts and on whatever schedule: 1 for one that knows nothing.
    """
    place = draw.position.to(x.device) % len(LEVELS)
    log_snr = torch.tensor(LEVELS, dtype=x.dtype, device=x.device)[place]
    t = denoiser.schedule.inverse(-log_snr / 2)
    alpha, sigma = (like(s, x) for s in denoiser.schedule(t))
    x_hat = denoiser(alpha * x + sigma * draw.normal("noise", x.shape[1:]).to(x), t, cond)
    error = ((x_hat - x).square() * (1 + (alpha / sigma) ** 2)).flatten(1).mean(1)
    sums = torch.zeros(2, len(LEVELS), dtype=error.dtype, device=x.device)
    return sums.index_add(1, place, torch.stack((error, torch.ones_like(error))))


def curve(sums: Tensor) -> dict[str, float]:
    """What `level_errors` gave, added up -> over all ranks, the error at each level that was met, and their mean, `val/error`."""
    total, count = reduce_sum(sums).tolist()
    errors = {NAME.format(level): e / n for level, e, n in zip(LEVELS, total, count) if n}
    return errors | {"val/error": sum(errors.values()) / max(len(errors), 1)}


class LevelCurve(pl.Callback):
    """FOLDER/levels.png: the error over log-SNR, a line for each validation of this process, the latest the darkest."""

    def __init__(self, folder: str) -> None:
        self.folder, self.lines = Path(folder), []

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draws again with the new line, on rank 0."""
        errors = {level: trainer.callback_metrics.get(NAME.format(level)) for level in LEVELS}
        if not trainer.is_global_zero or all(error is None for error in errors.values()):
            return
        self.lines.append((trainer.global_step, {level: float(e) for level, e in errors.items() if e is not None}))
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        for i, (step, line) in enumerate(self.lines):
            last = i == len(self.lines) - 1
            shade = 0.15 + 0.85 * (i + 1) / len(self.lines)
            axes.plot(list(line), list(line.values()), "o-", color="C0", alpha=shade, label=f"step {step}" if last else None)
        axes.set(xlabel="log-SNR  (noise left, data right)", ylabel="error of the velocity", ylim=(0, None))
        axes.legend(frameon=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / "levels.png", dpi=120)
