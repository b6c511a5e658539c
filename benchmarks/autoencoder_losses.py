"""Which losses an autoencoder needs: emoji at 64 px, factors 4 and 8, perceptual loss and adversary each on and off.

    python -m benchmarks.autoencoder_losses [4] [8]     trains runs/autoencoders/f4-... and f8-..., eight runs
    python -m benchmarks.autoencoder_losses table       measures them; writes runs/autoencoders/table.md and pictures.png

Needs the quickstart's CLIP: python train.py experiment=emoji/clip run_id=quickstart/clip
"""

import itertools
import sys
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from ldm.build import build, load_autoencoder
from ldm.command_line import compose_config
from ldm.loss.features import Features
from ldm.training.autoencoding import fidelity
from train import train

HOME = Path("runs/autoencoders")
STEPS = 800
MULT = {4: "[1,2,2]", 8: "[1,2,2,2]"}
ADVERSARY = ["adversary.start=300", "adversary.weight=0.2", "adversary.optimizer.lr=5e-4"]
SHOWN = (0, 8, 16, 24, 32, 40, 48, 56)  # validation pictures


def settings():
    """name -> (factor, perceptual, adversary), in the table's order."""
    return {
        f"f{f}" + "-perceptual" * perceptual + "-adversary" * adversary: (f, perceptual, adversary)
        for f, perceptual, adversary in itertools.product(MULT, (False, True), (False, True))
    }


def train_one(name, factor, perceptual, adversary):
    overrides = [
        f"experiment=emoji/autoencoder{'_gan' * adversary}",
        f"run_id=autoencoders/{name}",
        "data.size=64",
        "data.batch=8",
        f"autoencoder.mult={MULT[factor]}",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS // 4}",
        f"callback.reconstructions.every={STEPS // 2}",
        *([] if perceptual else ["training.perceptual=null"]),
        *(ADVERSARY if adversary else []),
    ]
    print("python train.py", *overrides, flush=True)
    train(compose_config("train", overrides))


@torch.no_grad()
def table():
    data = build(compose_config("train", ["data.size=64"]).data)
    data.prepare_data()
    images = torch.cat([data.on_after_batch_transfer(b)["image"] for b in data.ordered("val", 32)])
    clip = Features("local-dir:runs/quickstart/clip")
    lines = ["| factor | perceptual | adversary | PSNR (dB) | SSIM | CLIP distance |", "|---|---|---|---|---|---|"]
    rows = [images[list(SHOWN)]]
    for name, (factor, *chosen) in settings().items():
        net = load_autoencoder(str(HOME / name))
        output = torch.cat([net.decode(net.encode(part).mean).clamp(-1, 1) for part in images.split(32)])
        told = fidelity(output, images)
        words = " | ".join("yes" if on else "no" for on in chosen)
        lines.append(f"| {factor} | {words} | {told['psnr']:.2f} | {told['ssim']:.3f} | {clip(output, images):.4f} |")
        rows.append(output[list(SHOWN)])
    (HOME / "table.md").write_text("\n".join(lines) + "\n")
    save_image(make_grid(torch.cat(rows).add(1).div(2), nrow=len(SHOWN), padding=2, pad_value=1.0), HOME / "pictures.png")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    else:
        for name, (factor, perceptual, adversary) in settings().items():
            if not sys.argv[1:] or str(factor) in sys.argv[1:]:
                train_one(name, factor, perceptual, adversary)
