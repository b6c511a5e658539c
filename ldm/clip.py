"""A frozen CLIP, by open_clip's name or from a local folder, and how its towers are read."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.folder import LOCAL, as_run, load_tensors
from ldm.nn.empty import is_weightless, weighted, weightless


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
    if is_weightless() and not pretrained and ":" not in model:
        return open_clip.create_model(model, device="meta").eval().requires_grad_(False)
    with weighted():
        clip = open_clip.create_model(model, pretrained=pretrained, device=torch.get_default_device())
    return clip.eval().requires_grad_(False)


def load_text_tower(model: str, pretrained: str | None, option: str) -> nn.Module:
    """The text half of `load_clip`; a local folder need not hold the image half.

    Raises:
        FileNotFoundError: as `load_clip`. ValueError: the folder's weights are not those of its text tower.
    """
    folder = Path(model.removeprefix(LOCAL))
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())["model_cfg"] if model.startswith(LOCAL) and path.is_file() else {}
    if not config or config.get("custom_text") or "hf_model_name" in config["text_cfg"]:
        clip = load_clip(model, pretrained, option)
        if not hasattr(clip, "token_embedding"):
            return clip.text
    else:
        with weightless():
            clip = blank_text_tower(config)
        weights = load_tensors(folder / "open_clip_model.safetensors")
        text = set(clip.state_dict()) - {"logit_scale"}
        if lacking := sorted(text - weights.keys()):
            raise ValueError(f"{option}.model={model}: its weights lack {lacking[:3]} of the text tower; export the CLIP again.")
        whole = {name: weights[name].float() for name in text} | {"logit_scale": torch.zeros(())}
        with weighted():
            clip.load_state_dict(whole, assign=True)
        return clip
    del clip.visual
    return clip


def blank_text_tower(config: Mapping[str, Any]) -> nn.Module:
    """The text half of open_clip's model_cfg, frozen, with random weights."""
    gelu = config.get("quick_gelu", False)
    clip = open_clip.CLIP(config["embed_dim"], NO_VISION, config["text_cfg"], quick_gelu=gelu).eval().requires_grad_(False)
    del clip.visual
    return clip


def named_text_tower(model: str, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One of open_clip's names -> its model_cfg, and its text tower's weights."""
    tower = load_text_tower(model, pretrained, "condition.text")
    return open_clip.get_model_config(model), {n: x for n, x in tower.state_dict().items() if n != "logit_scale"}


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's byte-pair encoding, which ships with open_clip, as OpenAI wrote it: ids by token, and the merges in their order."""
    words = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {names.get(word, word): number for word, number in words.encoder.items()}, [
        " ".join(pair) for pair in sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    ]


NO_VISION = {"image_size": 1, "patch_size": 1, "layers": 0, "width": 1, "head_width": 1}


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
    return hidden, end if tower.text_projection is None else end @ tower.text_projection


def spoken(ids: Tensor) -> Tensor:
    """ids: (B, L), the end token being the largest id -> (B, L) bool, True up to and with the end of the text."""
    return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(dim=1, keepdim=True)


def warn_of_cut(caption: str, tokenizer: Any, length: int) -> str:
    """The same caption; a warning quotes what of it lies behind the first `length` - 2 byte pairs, which nobody reads."""
    ids = tokenizer.encode(caption) if hasattr(tokenizer, "encode") else []
    if len(ids) > length - 2:
        warnings.warn(
            f"{len(ids)} tokens do not fit into {length - 2}; cut off: {tokenizer.decode(ids[length - 2 :])!r}", stacklevel=2
        )
    return caption
