"""From what a person asks on the command line to the fields that conditions read, and from pictures to files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from ldm.folder import write_text, write_whole
from ldm.model import LatentModel


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
