"""What the latents of all validation pictures are like, as training goes on: to disk, and to the loggers."""

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ldm.files.folder import write_json
from ldm.files.picture import from_bytes
from ldm.training.callback.preview import Preview
from ldm.training.feed import data_of
from ldm.training.protocols import Quantised, Trainable
from ldm.types import DataModule

SHOWN = 16  # channels


class Latents(Preview):
    """FOLDER/step.png, histograms of the first 16 channels of sampled latents; FOLDER/step.json and the loggers: numbers.

    Sampled latents are those that reach the decoder or, of a VQ, the quantiser, not whitened. The noise is the same every time.
    """

    def __init__(self, folder: str, every: int) -> None:
        super().__init__(folder, every)

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
        """-> (1, 3, h, w), the histograms."""
        channels, numbers = measure(module.autoencoder, data_of(trainer), module.device)
        statistics = {"mean": channels.mean(1).tolist(), "std": channels.std(1).tolist()}
        write_json({**numbers, **statistics}, self.folder / f"{trainer.global_step:08d}.json")
        for logger in trainer.loggers:
            logger.log_metrics({f"latents/{name}": value for name, value in numbers.items()}, step=trainer.global_step)
        return histograms(channels[:SHOWN])


@torch.no_grad()
def measure(autoencoder: Trainable, data: DataModule, device: torch.device) -> tuple[Tensor, dict[str, float]]:
    """-> sampled latents of the validation pictures (C, N), and numbers: `kl` in nats a picture, or `usage` and `perplexity`.

    There are none where the encoder is of another kind, and says latents without noise.
    """
    generator, parts, kl, counts, pictures = torch.Generator().manual_seed(0), [], 0.0, 0, 0
    for batch in data.ordered("val", batch=32):
        images = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)["image"]
        moments = autoencoder.posterior(images)
        z = moments.sample(torch.randn(moments.mean.shape, generator=generator))
        parts.append(z.transpose(0, 1).flatten(1).float().cpu())
        pictures += len(images)
        if isinstance(autoencoder, Quantised):
            counts = counts + torch.bincount(autoencoder.quantise(z)[1].flatten(), minlength=autoencoder.codes())
        elif moments.std.any():
            kl += 0.5 * (moments.mean.square() + moments.std.square() - 1 - 2 * moments.std.log()).sum().item()
    if not isinstance(autoencoder, Quantised):
        return torch.cat(parts, 1), {"kl": kl / pictures} if kl else {}
    share = counts.double() / counts.sum()
    return torch.cat(parts, 1), {
        "usage": (share > 0).double().mean().item(),
        "perplexity": torch.special.entr(share).sum().exp().item(),
    }


def histograms(channels: Tensor) -> Tensor:
    """(C, N) -> a picture (1, 3, h, w) in [-1, 1]: each channel's histogram, and the normal curve of its mean and deviation."""
    columns = min(len(channels), 4)
    rows = -(-len(channels) // columns)
    figure = Figure(figsize=(2.5 * columns, 1.8 * rows), layout="constrained")
    for i, (x, axes) in enumerate(zip(channels, figure.subplots(rows, columns, squeeze=False).flat)):
        axes.hist(x.numpy(), bins=64, density=True, color="tab:blue")
        grid = torch.linspace(x.min().item(), x.max().item(), 200)
        normal = torch.exp(-0.5 * ((grid - x.mean()) / x.std()) ** 2) / (x.std() * (2 * torch.pi) ** 0.5)
        axes.plot(grid.numpy(), normal.numpy(), color="black", linewidth=1)
        axes.set_title(f"channel {i}: {x.mean():.2f} ± {x.std():.2f}", fontsize=9)
        axes.set_yticks([])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.from_numpy(np.array(canvas.buffer_rgba()))[..., :3]
    return from_bytes(pixels.permute(2, 0, 1)[None])
