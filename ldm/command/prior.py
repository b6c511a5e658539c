"""Draws class pictures for DreamBooth:  ldm prior model=sd1.5 prompt='a photo of a dog' count=200 out=runs/prior/dog

Picture i is of seed + i and of the i-th prompt, these in turn. OUT/pictures/00000.png, 00000.txt and so on, which data=dreambooth
reads as data.prior=OUT, and OUT/prior.json. Started again it draws what is missing; under torchrun each process draws its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.command.line import command
from ldm.errors import Refusal

# Settings of sample.yaml that class pictures have no word for.
PLAIN = {"prompts": None, "prompt_weights": False, "clip_skip": None, "paste": None, "init": None, "mask": None, "source": None}
PLAIN |= {"strength": None, "resamples": None, "ask": {}}
FREE = "count batch device out allow debug prompt prompts".split()  # no picture depends on them, or `captions` says it


def prior(config: DictConfig) -> Path:
    """Writes the pictures and how they were drawn; -> OUT."""
    from torchvision.utils import save_image
    from tqdm import tqdm

    from ldm.build import allowed, load_model
    from ldm.check import check_counts
    from ldm.command.sample import draw
    from ldm.command.usual import as_usual
    from ldm.data.dreambooth import PICTURES
    from ldm.data.usual import size_of
    from ldm.files.device import device_of
    from ldm.files.folder import write_text
    from ldm.files.process import by_first, first, meet, process
    from ldm.files.whole import write_whole
    from ldm.rest import at_rest, content_of, recipe_of

    check_counts(batch=config.batch, count=config.count)
    plain = OmegaConf.to_container(config, resolve=True)
    captions, out = _captions(plain), Path(config.out)
    place = at_rest(config.model)
    model = load_model(place, allowed(config), config.adapters, config.base).to(device_of(config.device))
    usual = recipe_of(place).get("usual", {})
    size, _ = size_of(plain["resolution"], usual)
    settings = {**as_usual({**plain, **PLAIN}, usual), "resolution": list(size)}
    record = {name: value for name, value in settings.items() if name not in (*FREE, *PLAIN)} | {"captions": captions}
    record |= {"model": str(config.model), "sha256": content_of(place), "adapters": list(model.adapters), "count": config.count}
    meet()
    by_first(lambda: _keep(record, out))
    rank, world, _ = process()
    mine = range(config.count * rank // world, config.count * (rank + 1) // world)
    missing = [i for i in mine if not (out / PICTURES / f"{i:05d}.png").is_file()]
    for part in tqdm(_runs(missing, config.batch), desc="drawing", disable=not missing):
        prompts = [captions[i % len(captions)] for i in part]
        words = {**settings, "prompt": prompts, "count": len(part), "seed": config.seed + part[0]}
        images, _ = draw(model, usual, words, allowed(config), lambda line: None)
        for i, caption, image in zip(part, prompts, images.add(1).div(2).clamp(0, 1)):
            write_text(caption + "\n", out / PICTURES / f"{i:05d}.txt")
            write_whole(out / PICTURES / f"{i:05d}.png", lambda path, image=image: save_image(image, path, format="png"))
    if first():
        print(f"The class pictures are in {out}{' once the other processes are done' if world > 1 else ''}: data.prior={out}")
    return out


def _captions(config: dict[str, Any]) -> list[str]:
    """The prompts, in turn."""
    from ldm.drawing.request import prompts_of

    if not (prompts := prompts_of(config)):
        raise Refusal("prompt='a photo of a dog', or prompts=FILE with one a line, must be said: what the class pictures show.")
    return prompts


def _keep(record: dict[str, Any], out: Path) -> None:
    """Says how the pictures are drawn; a longer series of the same goes on.

    Raises:
        Refusal: the folder holds others.
    """
    from ldm.data.dreambooth import RECORD
    from ldm.files.folder import read_json, write_json

    path = out / RECORD
    before = dict(read_json(path)) if path.is_file() else {}
    changed = [n for n in before if n not in ("count", "model") and before[n] != record.get(n)]  # a model may have moved
    if changed:
        was = ", ".join(f"{n}: {before[n]!s:.60} (now {record.get(n)!s:.60})" for n in changed)
        raise Refusal(f"out={out} holds class pictures of {before['model']} with other settings, {was}. Name another folder.")
    if not before and any(out.glob("*")):
        raise Refusal(f"out={out} holds other files and no {RECORD}: name a folder of its own.")
    write_json({**record, "count": max(record["count"], before.get("count", 0))}, path)


def _runs(numbers: Sequence[int], most: int) -> list[list[int]]:
    """Numbers in their order -> those that follow one another, at most so many each."""
    rows = [[i for _, i in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [row[at : at + most] for row in rows for at in range(0, len(row), most)]


main = command("prior")(prior)
