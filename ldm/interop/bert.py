"""The LDM paper's text model, `condition=[bert]`, by the names of CompVis' files and of diffusers' LDMBertModel.

Both hold a head that guesses words, which nothing reads: it is left, and written as zeros. Their words, BERT's uncased
vocab.txt, lie in a folder of diffusers; beside a single file nothing says them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.condition.bert import Bert, Block
from ldm.errors import Refusal
from ldm.interop.bundle import WORDS, Bundle, filled, shapes_of
from ldm.interop.keys import check_keys
from ldm.interop.tie import Shapes, Tie, same, stacked, tied

OURS = "conditioner.embedders.bert."
THEIRS = "cond_stage_model.transformer."
HEAD = ("to_logits.weight", "to_logits.bias")
HEAD_WIDTH = 64  # of x-transformers, whatever the width
COMPVIS_ROOTS = {"words": "token_emb", "places": "pos_emb.emb", "norm": "norm"}
COMPVIS = {"norm_in": "0", "qkv": "1.to_{}", "out": "1.to_out", "norm_out": "0", "wide": "1.net.0.0", "narrow": "1.net.2"}
DIFFUSERS_ROOTS = {"words": "model.embed_tokens", "places": "model.embed_positions", "norm": "model.layer_norm"}
DIFFUSERS = {"norm_in": "self_attn_layer_norm", "qkv": "self_attn.{}_proj", "out": "self_attn.out_proj"}
DIFFUSERS |= {"norm_out": "final_layer_norm", "wide": "fc1", "narrow": "fc2"}


def compvis(names: Iterable[str]) -> dict[str, Tie]:
    """Our names -> CompVis', below `cond_stage_model.transformer.`: attention and feed-forward take turns among its layers."""
    return _ties(names, COMPVIS_ROOTS, lambda i, part: f"attn_layers.layers.{2 * i + _feeds(part)}.{COMPVIS[part]}")


def diffusers(names: Iterable[str]) -> dict[str, Tie]:
    """Our names -> those of diffusers' LDMBertModel."""
    return _ties(names, DIFFUSERS_ROOTS, lambda i, part: f"model.layers.{i}.{DIFFUSERS[part]}")


def bert_shapes(words: int, width: int, depth: int, heads: int, head_width: int, length: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of such a text model of so many words, which is not built in memory."""
    with torch.device("meta"):
        block = shapes_of(Block(width, heads, head_width))
    shapes = {"words.weight": (words, width), "places.weight": (length, width), "norm.weight": (width,), "norm.bias": (width,)}
    return shapes | {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}


def settings_of(shapes: Shapes) -> dict[str, Any]:
    """CompVis' names (below `cond_stage_model.transformer.`) and shapes -> how `Bert` is built; heads are 64 wide there.

    Raises:
        Refusal: this is no such text model.
    """
    try:
        inner, width = shapes["attn_layers.layers.0.1.to_q.weight"]
        depth, length = sum(name.endswith(".1.to_q.weight") for name in shapes), shapes["pos_emb.emb.weight"][0]
    except KeyError as error:
        raise Refusal(f"The text model is no BERT in CompVis' layout: {error} is missing among its tensors.") from error
    return {"width": width, "depth": depth, "heads": inner // HEAD_WIDTH, "head_width": HEAD_WIDTH, "length": length}


def diffusers_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """LDMBertModel's config -> how `Bert` is built.

    Raises:
        Refusal: a setting that the published one does not have.
    """
    check_keys(config, "LDMBertModel", "The bert")
    if config["encoder_ffn_dim"] != 4 * config["d_model"]:
        raise Refusal(f"The bert has encoder_ffn_dim={config['encoder_ffn_dim']}; 4 d_model, {4 * config['d_model']}, is known.")
    words = {"width": "d_model", "depth": "encoder_layers", "heads": "encoder_attention_heads", "head_width": "head_dim"}
    return {ours: config[theirs] for ours, theirs in {**words, "length": "max_position_embeddings"}.items()}


def diffusers_config(settings: Mapping[str, Any], words: int) -> dict[str, Any]:
    """How `Bert` is built -> LDMBertModel's config.

    Raises:
        Refusal: a length that the pipeline does not read.
    """
    if settings["length"] != 77:
        raise Refusal(f"diffusers' LDMTextToImagePipeline reads 77 words; found condition.bert.length={settings['length']}.")
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": words,
        "max_position_embeddings": settings["length"],
        "d_model": settings["width"],
        "encoder_layers": settings["depth"],
        "encoder_attention_heads": settings["heads"],
        "head_dim": settings["head_width"],
        "encoder_ffn_dim": 4 * settings["width"],
        "activation_function": "gelu",
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def head(words: Tensor) -> dict[str, Tensor]:
    """The head that nobody reads, in zeros; words: (words, D)."""
    return dict(zip(HEAD, (torch.zeros_like(words), words.new_zeros(len(words)))))


def node(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the condition, whose words lie in its sub-folder."""
    return {"_target_": "ldm.condition.bert.Bert", "vocabulary": f"./{WORDS}", **settings}


def taken_apart(bundle: Bundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the text model of a bundle is built, and its weights by its own names."""
    told = filled(Bert, bundle.recipe["condition"]["bert"])
    settings = {name: told[name] for name in ("width", "depth", "heads", "head_width", "length")}
    return settings, {n.removeprefix(OURS): x for n, x in bundle.weights.items() if n.startswith(OURS)}


def check_words(bundle: Bundle, source: str) -> None:
    """Raises ValueError where a text model has no words, or not as many as its table has rows."""
    if "bert" not in bundle.recipe["condition"]:
        return
    rows = len(bundle.weights[f"{OURS}words.weight"])
    found = 0 if bundle.words is None else len(bundle.words.rstrip("\n").split("\n"))
    if found != rows:
        raise Refusal(
            f"{source} holds a text model of {rows:,} words, and its vocabulary has {found:,}. Say where BERT's uncased "
            "vocab.txt lies, as google-bert/bert-base-uncased has it: --vocabulary FOLDER."
        )


def _ties(names: Iterable[str], roots: Mapping[str, str], place: Callable[[int, str], str]) -> dict[str, Tie]:
    def tie(name: str) -> Tie:
        *block, part, leaf = name.split(".")
        theirs = f"{place(int(block[1]), part) if block else roots[part]}.{leaf}"
        return stacked(*(theirs.format(letter) for letter in "qkv")) if part == "qkv" else same(theirs)

    return tied(names, tie)


def _feeds(part: str) -> bool:
    return part in ("norm_out", "wide", "narrow")
