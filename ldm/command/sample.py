"""Draws pictures:  python sample.py model=runs/quickstart/diffusion prompt='[red apple,fox]' seed=0 out=samples"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ldm.command.line import command

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.drawing.generate import Watch
    from ldm.model import LatentModel


def sample(config: DictConfig) -> Tensor:
    """Writes OUT/00000.png ..., OUT/grid.png and OUT/request.json; -> pictures (N, 3, h, w) in [-1, 1]."""
    from ldm.autoencoder.tiled import Tiled
    from ldm.build import allowed, load_model, recipe_of
    from ldm.check import check_counts
    from ldm.drawing.generate import compile_backbone
    from ldm.drawing.request import write_pictures
    from ldm.files.device import device_of

    check_counts(batch=config.batch, tile=config.tile)
    model = load_model(config.model, allowed(config)).to(device_of(config.device))
    if config.compile:
        compile_backbone(model.denoiser.backbone)
    if config.tile:
        model.autoencoder = Tiled(model.autoencoder, config.tile, config.tile // 4)
    plain = OmegaConf.to_container(config, resolve=True)
    images, told = draw(model, recipe_of(config.model).get("usual", {}), plain, allowed(config))
    write_pictures(images, Path(config.out), told, model.conditioner.show(told["asked"]))
    print(f"{len(images)} pictures are in {config.out}")
    return images


def draw(
    model: LatentModel,
    usual: Mapping[str, Any],
    config: Mapping[str, Any],
    allow: Sequence[str],
    say: Callable[[str], None] = print,
    watch: Watch | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Draws what a plain config of sample.yaml asks for.

    Args:
        usual: how the model is drawn from where the config does not say it (data/usual.py).
        config: `sampler` and `guidance` may be built already; the pictures that it names may be PIL's.
        allow: the modules that its nodes may be built from.
        say: told what a person should know of the size.
        watch: as in drawing/generate.py.

    Returns:
        Pictures (N, 3, h, w) in [-1, 1] on the CPU, and the config with `seeds` and `asked`, the fields that the model was told.
    """
    from ldm.build import build
    from ldm.data.usual import size_of
    from ldm.drawing.generate import draw_all
    from ldm.drawing.request import read_edit, read_request

    size, lines = size_of(config["resolution"], usual)
    for line in lines:
        say(line)
    config = {**config, "resolution": list(size)}
    ask, count = read_request(config, model)
    seeds = range(config["seed"], config["seed"] + count)
    sampler, guidance = (
        build(node, allow) if isinstance(node, Mapping) else node for node in (config["sampler"], config["guidance"])
    )
    sampler = read_edit(config, model, ask, sampler, size)
    images = draw_all(model, ask, sampler, guidance, seeds, size, config["batch"], config["paste"], watch)
    return images, {**config, "seeds": list(seeds), "asked": ask}


main = command("sample")(sample)
