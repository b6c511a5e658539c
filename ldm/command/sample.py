"""Draws pictures:  python sample.py model=runs/quickstart/diffusion prompt='[red apple,fox]' seed=0 out=samples"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.command.line import command


def sample(config: DictConfig) -> Any:
    """Writes OUT/00000.png ..., OUT/grid.png and OUT/request.json; -> pictures (N, 3, h, w) in [-1, 1]."""
    from ldm.autoencoder.tiled import Tiled
    from ldm.build import allowed, build, load_model, recipe_of
    from ldm.data.usual import size_of
    from ldm.drawing.generate import compile_backbone, draw_all
    from ldm.drawing.request import read_edit, read_request, write_pictures
    from ldm.files.device import device_of

    model = load_model(config.model, allowed(config), config.adapters, config.base).to(device_of(config.device))
    if config.compile:
        compile_backbone(model.denoiser.backbone)
    if config.tile:
        model.autoencoder = Tiled(model.autoencoder, config.tile, config.tile // 4)
    plain = OmegaConf.to_container(config, resolve=True)
    size, lines = size_of(plain["resolution"], recipe_of(config.model).get("usual", {}))
    print(*lines, sep="\n", end="\n" if lines else "")
    plain["resolution"] = list(size)
    ask, count = read_request(plain, model)
    seeds = range(config.seed, config.seed + count)
    sampler, guidance = (build(node, allowed(config)) for node in (config.sampler, config.guidance))
    sampler = read_edit(config, model, ask, sampler, size)
    images = draw_all(model, ask, sampler, guidance, seeds, size, config.batch, config.paste)
    told = {**plain, "seeds": list(seeds), "asked": ask, "adapters": list(model.adapters)}
    write_pictures(images, Path(config.out), told, model.conditioner.show(ask))
    print(f"{count} pictures are in {config.out}")
    return images


main = command("sample")(sample)
