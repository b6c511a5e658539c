"""Latents ahead of time:  python precompute.py model=runs/quickstart/autoencoder data=emoji out=runs/quickstart/latents

Under torchrun or srun every process writes shards of its own; started again, it goes on where it stopped.
"""

import os
from pathlib import Path

from omegaconf import DictConfig

from ldm.command_line import command


def precompute(config: DictConfig) -> Path:
    """Writes shards of moments beside their captions and records, OUT/train and OUT/val; -> OUT."""
    import torch

    from ldm.build import allowed, build
    from ldm.data.latents import write_latents

    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    found = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = found if config.device == "auto" else config.device
    trained = {"_target_": "ldm.build.load_autoencoder", "path": config.model}
    autoencoder, data = build(trained, allowed(config)).to(device), build(config.data, allowed(config))
    data.prepare_data()
    data.setup()
    for split in ("train", "val") if data.val_set else ("train",):
        folder = Path(config.out) / split
        write_latents(autoencoder, data, split, folder, config.batch, device, config.per_shard, config.half, rank, world)
    use = f"data=latents data.train={config.out}/train data.val={config.out}/val"
    print(f"The latents are in {config.out}; train on them with {use}")
    return Path(config.out)


if __name__ == "__main__":
    command("precompute")(precompute)()
