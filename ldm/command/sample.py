"""Draws pictures:  python sample.py model=runs/quickstart/diffusion prompt='[red apple,fox]' seed=0 out=samples

On several processes each draws its share of them: torchrun --nproc-per-node 8 sample.py ..., or srun -n 8 python sample.py ...
"""

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
    import torch

    from ldm.build import allowed
    from ldm.drawing.request import write_pictures
    from ldm.files.process import first, from_all, meet, process, say

    check(config)
    meet()
    rank, world, _ = process()
    model, usual = ready(config)
    plain = OmegaConf.to_container(config, resolve=True)
    images, record = draw(model, usual, plain, allowed(config), say, share=(rank, world))
    images = torch.cat(from_all(images))
    if first():
        write_pictures(images, Path(config.out), record, model.conditioner.show(record["asked"]))
    say(f"{len(images)} pictures are in {config.out}")
    return images


def check(config: DictConfig) -> None:
    """Raises Refusal where a count is none, before anything is loaded."""
    from ldm.check import check_counts

    check_counts(batch=config.batch, tile=config.tile)


def ready(config: DictConfig) -> tuple[LatentModel, dict[str, Any]]:
    """-> the model that a composed sample.yaml names, with its adapters and on its device, and how it is usually drawn from.

    A mistake in the sampler's or the guidance's settings is named before the model is loaded.
    """
    from ldm.autoencoder.tiled import Tiled
    from ldm.build import allowed, load_model
    from ldm.command.usual import check_drawing
    from ldm.drawing.generate import compile_backbone
    from ldm.drawing.offload import offload
    from ldm.drawing.precision import hold, precision_of
    from ldm.files.device import device_of
    from ldm.rest import at_rest, recipe_of

    place = at_rest(config.model)
    usual = recipe_of(place).get("usual", {})
    check_drawing(OmegaConf.to_container(config, resolve=True), usual, allowed(config))
    model, device = load_model(place, allowed(config), config.adapters, config.base), device_of(config.device)
    hold(model.denoiser.backbone, usual, precision_of(config.precision, usual, device))
    if config.tile:
        model.autoencoder = Tiled(model.autoencoder, config.tile, config.tile // 4)
    model = offload(model, device) if config.offload else model.to(device)
    if config.compile:
        compile_backbone(model.denoiser.backbone)
    return model, usual


def draw(
    model: LatentModel,
    usual: Mapping[str, Any],
    config: Mapping[str, Any],
    allow: Sequence[str],
    say: Callable[[str], None] = print,
    watch: Watch | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, dict[str, Any]]:
    """Draws what a plain config of sample.yaml asks for.

    Args:
        model: what draws.
        usual: how the model is drawn from where the config does not say it (data/usual.py).
        config: what is null in it is as usual. `sampler` and `guidance` may be built already, its pictures may be PIL's.
        allow: the modules that its nodes may be built from.
        say: told what a person should know of the size.
        watch: as in drawing/generate.py.
        share: of several processes the number of this one, from 0, and how many there are; each draws some of the pictures.

    Returns:
        This process's pictures, (N, 3, h, w) in [-1, 1] on the CPU, and the config with all pictures' `seeds` and `asked`, the
        fields that the model was told, and with `adapters`.
    """
    import torch

    from ldm.build import build
    from ldm.command.usual import as_usual
    from ldm.data.usual import size_of
    from ldm.drawing.generate import draw_all
    from ldm.drawing.precision import in_precision, precision_of
    from ldm.drawing.request import read_edit, read_request, skip_layers
    from ldm.drawing.weights import taking_turns

    size, lines = size_of(config["resolution"], usual)
    for line in lines:
        say(line)
    device = next(model.denoiser.parameters()).device
    config = {**as_usual(config, usual), "resolution": list(size), "precision": precision_of(config["precision"], usual, device)}
    skip_layers(model, config["clip_skip"])
    ask, count = read_request(config, model)
    seeds = range(config["seed"], config["seed"] + count)
    sampler, guidance = (
        build(node, allow) if isinstance(node, Mapping) else node for node in (config["sampler"], config["guidance"])
    )
    sampler = read_edit(config, model, ask, sampler, size)
    mine = slice(count * share[0] // share[1], count * (share[0] + 1) // share[1])
    part = {field: value[mine] for field, value in ask.items()}
    record = {**config, "seeds": list(seeds), "asked": ask, "adapters": list(model.adapters)}
    if not seeds[mine]:
        return torch.empty(0, 3, *size), record
    guidance = in_precision(taking_turns(guidance) if config["prompt_weights"] else guidance, config["precision"], device)
    images = draw_all(model, part, sampler, guidance, seeds[mine], size, config["batch"], config["paste"], watch)
    return images, record


main = command("sample")(sample)
