"""A CLIP's towers: open_clip's names, which are ours, and those of transformers' CLIPTextModel and CLIPVisionModel."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import Refusal
from ldm.interop.keys import check_keys
from ldm.interop.tie import Tie, renamer, same, stacked, tied, turned

LAYER = renamer(
    {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
)
EMBEDDINGS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
}
VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
}
PREFIX, VISION_PREFIX = "text_model.", "vision_model."


def transformers(names: Iterable[str]) -> dict[str, Tie]:
    """open_clip's names -> transformers' CLIPTextModel's and CLIPTextModelWithProjection's."""

    def tie(name: str) -> Tie:
        if name == "text_projection":
            return turned("text_projection.weight")
        if name in EMBEDDINGS:
            return same(PREFIX + EMBEDDINGS[name])
        if name.startswith("ln_final."):
            return same(PREFIX + name.replace("ln_final", "final_layer_norm"))
        return _in_layer(name, PREFIX)

    return tied(names, tie)


def transformers_vision(names: Iterable[str]) -> dict[str, Tie]:
    """open_clip's names of an image tower -> transformers' CLIPVisionModelWithProjection's."""

    def tie(name: str) -> Tie:
        if name == "proj":
            return turned("visual_projection.weight")
        if name in VISION:
            return same(VISION_PREFIX + VISION[name])
        if name.startswith(("ln_pre.", "ln_post.")):
            return same(VISION_PREFIX + name.replace("ln_pre", "pre_layrnorm").replace("ln_post", "post_layernorm"))
        return _in_layer(name, VISION_PREFIX)

    return tied(names, tie)


def _in_layer(name: str, prefix: str) -> Tie:
    i, tail = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name).groups()
    layer = f"{prefix}encoder.layers.{i}."
    if tail.startswith("attn.in_proj_"):
        return stacked(*(f"{layer}self_attn.{letter}_proj.{tail.removeprefix('attn.in_proj_')}" for letter in "qkv"))
    return same(layer + LAYER(tail))


def open_clip_vision(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """transformers' config of a CLIPVisionModelWithProjection -> open_clip's model_cfg of such an image tower.

    Raises:
        Refusal: a setting that open_clip does not have.
    """
    config = check_keys(config, "CLIPVisionModelWithProjection", place)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads or config["image_size"] % config["patch_size"]:
        raise Refusal(f"{place}: its heads ({heads}) or patches ({config['patch_size']}) do not divide width or picture.")
    vision = {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "width": width,
        "head_width": width // heads,
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    return {"embed_dim": config["projection_dim"], "quick_gelu": config["hidden_act"] == "quick_gelu", "vision_cfg": vision}


def open_clip_config(config: Mapping[str, Any], projects: bool) -> dict[str, Any]:
    """transformers' config of a CLIPTextModel, or of one that `projects` -> open_clip's model_cfg of such a text tower.

    Raises:
        Refusal: a setting that open_clip does not have.
    """
    config = check_keys(config, "CLIPTextModel", "The text encoder")
    act, width, heads = config["hidden_act"], config["hidden_size"], config["num_attention_heads"]
    if width % heads or (projects and config["projection_dim"] is None):
        said = f"hidden_size={width}, num_attention_heads={heads}, projection_dim={config['projection_dim']}"
        raise Refusal(f"The text encoder has {said}; heads that divide the width, and a width to project to, were wanted.")
    text = {
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "width": width,
        "heads": heads,
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / width,
        **({} if projects else {"proj_type": "none"}),
    }
    return {"embed_dim": config["projection_dim"] or width, "quick_gelu": act == "quick_gelu", "text_cfg": text}


def transformers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg -> transformers' config of the same text tower."""
    text = config["text_cfg"]
    projects = text.get("proj_type") != "none"
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": text["context_length"],
        "num_attention_heads": text["heads"],
        "num_hidden_layers": text["layers"],
        "projection_dim": config["embed_dim"],
        "vocab_size": text["vocab_size"],
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }
