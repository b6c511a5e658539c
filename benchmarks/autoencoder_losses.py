"""Which losses an autoencoder needs: emoji at 64 px, factors 4 and 8, perceptual loss and adversary each on and off.

    python -m benchmarks.autoencoder_losses [4] [8]     trains runs/autoencoders/f4-... and f8-..., eight runs
    python -m benchmarks.autoencoder_losses table       measures those that are there: table.md, pictures.jpg

Needs the quickstart's CLIP: python train.py experiment=emoji/clip run_id=quickstart/clip
"""

import itertools
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ldm.build import build, load_autoencoder
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.loss.features import Features
from ldm.metric.frechet import frechet, moments
from ldm.tower.clip import load_clip, preprocess
from ldm.training.stage.autoencoding import fidelity

HOME = Path("runs/autoencoders")
STEPS = 800
MULT = {4: "[1,2,2]", 8: "[1,2,2,2]"}
MIRRORED = ["training.augment.upend=0", "training.augment.turn=0", "training.augment.recolour=0"]  # and no other change
ADVERSARY = ["adversary.start=300", "adversary.weight=0.2", "adversary.optimizer.lr=5e-4"]
CLIP = "local-dir:runs/quickstart/clip"
MANY = 512  # training pictures, for the Fréchet distance
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
        *MIRRORED,
        *([] if perceptual else ["training.perceptual=null"]),
        *(ADVERSARY if adversary else []),
    ]
    print("python train.py", *overrides, flush=True)
    train(compose_config("train", overrides))


def statistics(clip, images):
    """Mean and covariance of a CLIP's picture vectors."""
    return moments({"features": torch.cat([clip.encode_image(preprocess(clip.visual, part)) for part in images.split(64)])})


@torch.no_grad()
def table():
    data = build(compose_config("train", ["data.size=64"]).data)
    data.prepare_data()
    images = torch.cat([data.on_after_batch_transfer(b)["image"] for b in data.ordered("val", 32)])
    many = data.on_after_batch_transfer(data.rows("train", range(MANY)))["image"]
    distance, clip = Features(CLIP), load_clip(CLIP, None, "loss")
    real = statistics(clip, many)
    heads = ("factor", "perceptual", "adversary", "PSNR (dB)", "SSIM", "CLIP distance", "Fréchet in CLIP")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = [images[list(SHOWN)]]
    for name, (factor, *chosen) in settings().items():
        if not (HOME / name / "model.safetensors").is_file():
            continue
        net = load_autoencoder(str(HOME / name))
        output, more = (
            torch.cat([net.decode(net.encode(part).mean).clamp(-1, 1) for part in x.split(32)]) for x in (images, many)
        )
        told, own = fidelity(output, images), statistics(clip, more)
        far = frechet(own["mean"], own["covariance"], real["mean"], real["covariance"])
        words = " | ".join("yes" if on else "no" for on in chosen)
        numbers = f"{told['psnr']:.2f} | {told['ssim']:.3f} | {distance(output, images):.4f} | {far:.3f}"
        lines.append(f"| {factor} | {words} | {numbers} |")
        rows.append(output[list(SHOWN)])
    (HOME / "table.md").write_text("\n".join(lines) + "\n")
    grid = make_grid(torch.cat(rows).add(1).div(2), nrow=len(SHOWN), padding=2, pad_value=1.0)
    to_pil_image(grid).save(HOME / "pictures.jpg", quality=92, subsampling=0)
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    else:
        for name, (factor, perceptual, adversary) in settings().items():
            if not sys.argv[1:] or str(factor) in sys.argv[1:]:
                train_one(name, factor, perceptual, adversary)
