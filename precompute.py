"""Latents ahead of time:  python precompute.py model=runs/quickstart/autoencoder data=emoji out=runs/quickstart/latents"""

from pathlib import Path

from omegaconf import DictConfig

from ldm.command_line import command


def precompute(config: DictConfig) -> Path:
    """Writes shards of moments beside their captions and records, OUT/train and OUT/val; -> OUT."""
    import torch

    from ldm.build import allowed, build
    from ldm.data.latents import moments_of
    from ldm.data.write import write_shards

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    trained = {"_target_": "ldm.build.load_autoencoder", "path": config.model}
    autoencoder, data = build(trained, allowed(config)).to(device), build(config.data, allowed(config))
    data.prepare_data()
    data.setup()
    for split in ("train", "val") if data.val_set else ("train",):
        write_shards(moments_of(autoencoder, data, split, config.batch, device), Path(config.out) / split)
    use = f"data=latents data.train={config.out}/train data.val={config.out}/val"
    print(f"The latents are in {config.out}; train on them with {use}")
    return Path(config.out)


if __name__ == "__main__":
    command("precompute")(precompute)()
