"""From what a person asks on the command line to the fields that conditions read, and from pictures to files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid, save_image

from ldm.edit import FromInversion, FromPicture, Inpainting
from ldm.folder import write_text, write_whole
from ldm.model import LatentModel
from ldm.types import Denoise, Sampler

Size = tuple[int, int]


def read_request(config: Mapping[str, Any], model: LatentModel) -> tuple[dict[str, Any], int]:
    """config: prompt, prompts, negative, ask, count -> the fields, N of each, and N.

    Raises:
        ValueError: a condition of the model is not asked for, is not known, or lists differ in length.
    """
    ask = {key: value if isinstance(value, list) else [value] for key, value in (config.get("ask") or {}).items()}
    prompts = _prompts(config)
    if prompts:
        ask["caption"] = prompts
    keys = {embedder.key: name for name, embedder in model.conditioner.embedders.items()}
    wrong, missing = ask.keys() - keys.keys(), keys.keys() - ask.keys()
    if wrong or missing:
        how = ", ".join("prompt='...'" if key == "caption" else f"ask.{key}=..." for key in keys) or "no condition at all"
        raise ValueError(f"This model is asked by {how}; found {sorted(ask) or 'nothing'}.")
    count = config.get("count") or max((len(v) for v in ask.values()), default=1)
    for key, value in ask.items():
        if count % len(value):
            raise ValueError(
                f"{len(value)} values of {key} do not go evenly into {count} pictures; give 1 or {count} (or count=...)."
            )
        ask[key] = [str(v) if key == "caption" else v for v in value] * (count // len(value))
        if key != "caption":
            ask[key] = torch.tensor([int(v) for v in ask[key]])
    if config.get("negative") is not None:
        ask["negative.caption"] = [str(config["negative"])] * count
    return ask, count


def read_edit(config: Mapping[str, Any], model: LatentModel, ask: Mapping[str, Any], sampler: Sampler, size: Size) -> Sampler:
    """config: init, mask, source, strength, resamples -> the sampler, begun from the picture `init` where there is one.

    `mask` (white is drawn anew) asks for inpainting, `source` (what the picture shows) for inversion.

    Raises:
        ValueError: a mask or a source without a picture, or both. FileNotFoundError: no such file.
    """
    init, mask, source, strength = (config.get(name) for name in ("init", "mask", "source", "strength"))
    if (init is None and (mask is not None or source is not None)) or (mask is not None and source is not None):
        raise ValueError(f"init={init} mask={mask} source={source}: one of mask and source goes with a picture (init=FILE).")
    if init is None:
        return sampler
    device = next(model.denoiser.parameters()).device
    with torch.no_grad():
        picture = model.autoencoder.encode(_read_image(init, "init", "RGB", size).to(device) * 2 - 1).mean
    if mask is not None:
        cells = adaptive_max_pool2d(_read_image(mask, "mask", "L", size), picture.shape[2:])
        return Inpainting(sampler, picture, (cells > 0.5).float(), config["resamples"], strength)
    if source is None:
        return FromPicture(sampler, picture, strength)

    shown = {k: v[:1] for k, v in ask.items() if not k.startswith("negative.")} | {"caption": [str(source)]}

    def denoise(count: int) -> Denoise:
        told = model.tell({k: v.repeat(count) if isinstance(v, Tensor) else v * count for k, v in shown.items()})
        return lambda x_t, t: model.denoiser(x_t, t, told)

    return FromInversion(sampler, picture, denoise, strength)


def _read_image(path: str, name: str, mode: str, size: Size) -> Tensor:
    """A file, cut in its middle to `size` -> (1, 3 or 1, height, width) in [0, 1]."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}={path}: there is no such picture.")
    image = ImageOps.exif_transpose(Image.open(path)).convert(mode)
    return to_tensor(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC))[None]


def write_pictures(images: Tensor, folder: Path, request: Mapping[str, Any]) -> None:
    """images: (N, 3, h, w) in [-1, 1] -> FOLDER/00000.png ..., grid.png, request.json."""
    unit = images.add(1).div(2).clamp(0, 1)
    for i, image in enumerate(unit):
        write_whole(folder / f"{i:05d}.png", lambda path, image=image: save_image(image, path, format="png"))
    columns = min(8, len(unit))
    grid = make_grid(unit, nrow=columns, padding=1, pad_value=1.0)
    write_whole(folder / "grid.png", lambda path: save_image(grid, path, format="png"))
    plain = json.dumps(request, indent=2, ensure_ascii=False, default=lambda x: x.tolist() if isinstance(x, Tensor) else str(x))
    write_text(plain + "\n", folder / "request.json")


def _prompts(config: Mapping[str, Any]) -> list[str]:
    if config.get("prompts") is None:
        prompt = config.get("prompt")
        return [] if prompt is None else [str(p) for p in prompt] if isinstance(prompt, list) else [str(prompt)]
    path = Path(config["prompts"])
    if not path.is_file():
        raise FileNotFoundError(f"prompts={path}: there is no such file; it should hold one prompt a line.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]
