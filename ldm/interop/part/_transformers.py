"""A CLIP's text tower: open_clip's names, which are ours, and those of transformers' CLIPTextModel."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

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
PREFIX = "text_model."


def transformers(names: Iterable[str]) -> dict[str, Tie]:
    """open_clip's names -> transformers' CLIPTextModel's and CLIPTextModelWithProjection's."""

    def tie(name: str) -> Tie:
        if name == "text_projection":
            return turned("text_projection.weight")
        if name in EMBEDDINGS:
            return same(PREFIX + EMBEDDINGS[name])
        if name.startswith("ln_final."):
            return same(PREFIX + name.replace("ln_final", "final_layer_norm"))
        i, tail = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name).groups()
        layer = f"{PREFIX}encoder.layers.{i}."
        if tail.startswith("attn.in_proj_"):
            return stacked(*(f"{layer}self_attn.{letter}_proj.{tail.removeprefix('attn.in_proj_')}" for letter in "qkv"))
        return same(layer + LAYER(tail))

    return tied(names, tie)


def open_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' config of a CLIPTextModel -> open_clip's model_cfg of such a text tower.

    Raises:
        ValueError: a setting that open_clip does not have.
    """
    check_keys(config, "CLIPTextModel", "The text encoder")
    act = config["hidden_act"]
    projects = config.get("architectures") == ["CLIPTextModelWithProjection"]
    text = {
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        **({} if projects else {"proj_type": "none"}),
    }
    return {"embed_dim": config["projection_dim"], "quick_gelu": act == "quick_gelu", "text_cfg": text}


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
