"""The LDM paper's text model, `condition=[bert]`, by the names of CompVis' files and of diffusers' LDMBertModel.

Both hold a head that guesses words, which nothing reads: it is left, and written as zeros. Their words, BERT's uncased
vocab.txt, lie in a folder of diffusers; beside a single file nothing says them.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.condition.bert import Bert, Block
from ldm.errors import NotFound, Refusal
from ldm.files.folder import save_tensors, write_json, write_text
from ldm.interop import protocols
from ldm.interop.bundle import WORDS, Bundle, filled, home_of, shapes_of
from ldm.interop.files import take_part
from ldm.interop.keys import check_keys
from ldm.interop.source import File
from ldm.interop.tie import Shapes, Tie, give, same, stacked, tied
from ldm.interop.weights import read_config

TARGET = "ldm.condition.bert.Bert"
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
    """Names and shapes of such a text model, which is not built in memory.

    Args:
        words: in its vocabulary.
        width, depth, heads, head_width, length: as in `Bert`.
    """
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
    config = check_keys(config, "LDMBertModel", "The bert")
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


def _ties(names: Iterable[str], roots: Mapping[str, str], place: Callable[[int, str], str]) -> dict[str, Tie]:
    def tie(name: str) -> Tie:
        *block, part, leaf = name.split(".")
        theirs = f"{place(int(block[1]), part) if block else roots[part]}.{leaf}"
        return stacked(*(theirs.format(letter) for letter in "qkv")) if part == "qkv" else same(theirs)

    return tied(names, tie)


def _feeds(part: str) -> bool:
    return part in ("norm_out", "wide", "narrow")


class LDMBert(protocols.Part):
    """Trained with the network, so that its weights are among the model's own; a published recipe calls it `bert`."""

    kind = "bert"
    word = "text model"
    folders = ("bert", "tokenizer")

    def take_file(self, file: File, bundle: Bundle, scale: float) -> None:
        """CompVis', without its words."""
        if f"{THEIRS}token_emb.weight" not in file.weights:
            return
        theirs = file.below(THEIRS)
        settings = settings_of(theirs)
        shapes = bert_shapes(theirs["token_emb.weight"][0], **settings)
        weights = file.take(compvis(shapes), shapes, THEIRS)
        file.used |= {THEIRS + name for name in HEAD}
        self._put(bundle, settings, weights)

    def give_file(self, bundle: Bundle) -> dict[str, Tensor]:
        """The same, with a head of zeros."""
        if (apart := self._apart(bundle)) is None:
            return {}
        settings, weights = apart
        if settings["head_width"] != HEAD_WIDTH:
            name = bundle.made_by(TARGET)
            raise Refusal(f"CompVis' BERT has 64-wide heads; found condition.{name}.head_width={settings['head_width']}.")
        zeros = {THEIRS + name: x for name, x in head(weights["words.weight"]).items()}
        return give(compvis(weights), weights, THEIRS) | zeros

    def beside(self, bundle: Bundle) -> dict[str, Any]:
        """Its sizes."""
        if (apart := self._apart(bundle)) is None:
            return {}
        settings, weights = apart
        params = {"n_embed": settings["width"], "n_layer": settings["depth"], "max_seq_len": settings["length"]}
        params["vocab_size"] = len(weights["words.weight"])
        return {"cond_stage_config": {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": params}}

    def take_folder(self, folder: Path, index: Mapping[str, Any], bundle: Bundle) -> None:
        """LDMBertModel, and its words."""
        if "bert" not in index:
            return
        config = read_config(folder / "bert" / "config.json")
        settings = diffusers_settings(config)
        shapes = bert_shapes(config["vocab_size"], **settings)
        self._put(bundle, settings, take_part(folder / "bert", diffusers(shapes), shapes, "model", left=HEAD))
        bundle.words = _read_words(folder / "tokenizer")

    def give_folder(self, bundle: Bundle, folder: Path, index: Mapping[str, Any]) -> None:
        """The same."""
        if (apart := self._apart(bundle)) is None:
            return
        settings, weights = apart
        write_json(diffusers_config(settings, len(weights["words.weight"])), folder / "bert" / "config.json")
        save_tensors(give(diffusers(weights), weights) | head(weights["words.weight"]), folder / "bert" / "model.safetensors")
        write_text(bundle.words, folder / "tokenizer" / "vocab.txt")
        told = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": settings["length"]}
        write_json(told, folder / "tokenizer" / "tokenizer_config.json")

    def take_ours(self, bundle: Bundle, folder: Path) -> None:
        """Its words; its weights are the model's."""
        if (name := bundle.made_by(TARGET)) is not None:
            bundle.words = read_words(home_of(bundle.recipe["condition"][name]["vocabulary"], folder))

    def give_ours(self, bundle: Bundle, folder: Path) -> None:
        """The same."""
        if bundle.words is not None:
            write_text(bundle.words, folder / f"condition.{bundle.made_by(TARGET)}.vocabulary" / "vocab.txt")

    def prefix(self, bundle: Bundle) -> str | None:
        """Where its weights begin, in a model that has one."""
        name = bundle.made_by(TARGET)
        return None if name is None else f"conditioner.embedders.{name}."

    def check(self, bundle: Bundle, source: str) -> None:
        """As many words as its table has rows."""
        if (prefix := self.prefix(bundle)) is None:
            return
        rows = len(bundle.weights[f"{prefix}words.weight"])
        found = 0 if bundle.words is None else len(bundle.words.rstrip("\n").split("\n"))
        if found != rows:
            raise Refusal(
                f"{source} holds a text model of {rows:,} words, and its vocabulary has {found:,}. Say where BERT's uncased "
                "vocab.txt lies, as google-bert/bert-base-uncased has it: --vocabulary FOLDER."
            )

    def _put(self, bundle: Bundle, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        bundle.recipe["condition"] |= {self.kind: node(settings)}
        bundle.weights |= {f"{self.prefix(bundle)}{name}": x for name, x in weights.items()}

    def _apart(self, bundle: Bundle) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """How it is built, and its weights by its own names."""
        prefix = self.prefix(bundle)
        if prefix is None:
            return None
        told = filled(Bert, bundle.recipe["condition"][bundle.made_by(TARGET)])
        settings = {name: told[name] for name in ("width", "depth", "heads", "head_width", "length")}
        return settings, {n.removeprefix(prefix): x for n, x in bundle.weights.items() if n.startswith(prefix)}


def read_words(folder: Path) -> str:
    """BERT's vocab.txt.

    Raises:
        NotFound: it is not there.
    """
    path = folder / "vocab.txt"
    if not path.is_file():
        raise NotFound(f"There is no {path}. BERT's words are in the vocab.txt of google-bert/bert-base-uncased.")
    return path.read_text(encoding="utf-8")


def _read_words(folder: Path) -> str:
    """The vocab.txt of BertTokenizer's folder, of which late versions write a tokenizer.json alone.

    Raises:
        Refusal: words that are told apart by their case.
    """
    told = folder / "tokenizer_config.json"
    said = read_config(told) if told.is_file() else {}
    said = {name: value["content"] if isinstance(value, dict) and "content" in value else value for name, value in said.items()}
    check_keys(said, "BertTokenizer", str(told))
    if not said.get("do_lower_case", True):
        raise Refusal(f"{told} has do_lower_case=false; the words of this family are BERT's uncased ones.")
    if not (folder / "tokenizer.json").is_file():
        return read_words(folder)
    ids = read_config(folder / "tokenizer.json")["model"]["vocab"]
    return "\n".join(sorted(ids, key=ids.__getitem__)) + "\n"


PART = LDMBert()
