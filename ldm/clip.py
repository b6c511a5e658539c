"""A frozen CLIP, by open_clip's name or from a local folder, and how its towers are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.folder import LOCAL, as_run


def load_clip(model: str, pretrained: str | None, option: str) -> nn.Module:
    """An open_clip model, frozen: `model` and `pretrained` are a name with a tag or a local file, or `local-dir:FOLDER`.

    Raises:
        FileNotFoundError: a local folder without a CLIP; names the config line, `option`, and the command that trains one.
    """
    folder = Path(model.removeprefix(LOCAL))
    if model.startswith(LOCAL) and not (folder / "open_clip_config.json").is_file():
        raise FileNotFoundError(
            f"There is no CLIP in {folder} (open_clip_config.json is missing). Train one first: "
            f"python train.py experiment=emoji/clip {as_run(folder)}; or name another with {option}.model=local-dir:FOLDER, "
            f"or one of open_clip's names with {option}.pretrained=TAG_OR_FILE."
        )
    return open_clip.create_model(model, pretrained=pretrained).eval().requires_grad_(False)


def see(visual: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, h, w) in [-1, 1] -> the size and normalisation that an image tower was trained with."""
    if images.shape[2:] != visual.image_size:
        images = interpolate(images, visual.image_size, mode="bicubic", antialias=True)
    mean, std = (images.new_tensor(visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images.add(1).div(2) - mean) / std


def transform(visual: nn.Module) -> Callable[[Any], Tensor]:
    """What open_clip does to a PIL picture before this image tower: its numbers are the plain open_clip ones."""
    return image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)


def read(tower: nn.Module, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """ids: (B, L) token ids -> hidden states, (B, L, D) each, from before the transformer to its end; pooled: (B, E)."""
    hidden = [tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]]
    for block in tower.transformer.resblocks:
        hidden.append(block(hidden[-1], attn_mask=tower.attn_mask))
    end = tower.ln_final(hidden[-1])[torch.arange(len(ids)), ids.argmax(dim=1)]
    return hidden, end @ tower.text_projection


def spoken(ids: Tensor) -> Tensor:
    """ids: (B, L), the end token being the largest id -> (B, L) bool, True up to and with the end of the text."""
    return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(dim=1, keepdim=True)
