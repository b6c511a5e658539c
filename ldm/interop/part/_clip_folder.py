"""Text towers within folders of diffusers, each with its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_json
from ldm.interop.bundle import Bundle, Part
from ldm.interop.files import take_part
from ldm.interop.part._tokens import PADDING, read_tokenizer, write_tokenizer
from ldm.interop.part._towers import text_node, tower_shapes, towers
from ldm.interop.part._transformers import PREFIX, open_clip_config, transformers, transformers_config
from ldm.interop.tie import give
from ldm.interop.weights import class_of, read_config
from ldm.tower.clip import FIRST_LEARNED

CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
LEFT = (f"{PREFIX}embeddings.position_ids", "text_projection.weight", "logit_scale")  # computed, or read by another class


def slots_of(index: Mapping[str, Any]) -> list[str]:
    """Where in a pipeline CLIPs are; a T5 is read elsewhere."""
    return [slot for slot in ("", "_2") if class_of(index, f"text_encoder{slot}") not in (None, "T5EncoderModel")]


def read_texts(folder: Path, index: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Part]]:
    """The text condition, and its towers by sub-folder."""
    slots, third = slots_of(index), "text_encoder_3" in index
    names = {"": "large", "_2": "giant"}
    large = "_2" in slots
    nodes, parts = {}, {}
    for slot in slots:
        place = f"condition.text.towers.{names[slot]}" if large else "condition.text"
        parts[place] = _read_tower(folder / f"text_encoder{slot}", class_of(index, f"text_encoder{slot}"))
        text = parts[place].config["text_cfg"]
        told = read_tokenizer(folder / f"tokenizer{slot}", text["vocab_size"], text["context_length"])
        if large:
            zeros = index.get("force_zeros_for_empty_prompt", not third)
            told |= {"layers": [-2], "final_norm": False, "pooled": third or slot == "_2"}
            told |= {"dropped": "zeros" if zeros else "empty_prompt"}
        elif index.get("text_encoder_2"):  # a T5, as Flux has it: of the CLIP the vector alone
            told |= {"layers": [], "pooled": True, "projected": False}
        nodes[names[slot]] = text_node(place, **({"layers": [-1], "final_norm": True} | told))
    if not large:
        return {"text": nodes["large"]} if nodes else {}, parts
    return {"text": {"_target_": "ldm.condition.text.Texts", "towers": nodes}}, parts


def _read_tower(folder: Path, kind: str | None) -> Part:
    """The class that model_index.json names says whether the tower projects, and which tensors are read."""
    told = read_config(folder / "config.json")
    if kind not in CLASSES:
        raise Refusal(f"{folder} is of a {kind}; {' and '.join(CLASSES)} are known.")
    config = open_clip_config(told, projects=kind == CLASSES[1])
    if told.get("eos_token_id") == 2 and told["vocab_size"] > FIRST_LEARNED and config["text_cfg"].get("proj_type") != "none":
        raise Refusal(f"{folder} pools the largest id (eos_token_id=2), a learned one; eos_token_id=49407 is known beside those.")
    shapes = tower_shapes(config)
    return Part(
        config,
        take_part(folder, transformers(shapes), shapes, "model", LEFT, _today),
        kind="clip",
    )


def texts_of(bundle: Bundle) -> list[tuple[dict[str, Any], Part]]:
    """Each text condition with its tower, cut to the layer that is read.

    Raises:
        Refusal: it reads what no pipeline of diffusers reads.
    """
    found, several = [], False
    for place, node in towers(bundle.recipe["condition"]).items():
        if place not in bundle.parts:
            raise Refusal(
                f"{place} is {node['model']} by name, and its weights are not in this model, which pipelines of diffusers hold "
                "whole: convert the file that has its text encoders too, or use --to ldm, which names them."
            )
        several = several or ".towers." in place
        layers, norm = list(node.get("layers", [-1])), node.get("final_norm", True)
        plain = layers == [] and not node.get("projected", True)  # a vector alone, as Flux reads it
        wrong = [] if plain or (layers, norm) in _readable(several) else [f"layers={layers}, final_norm={norm}"]
        wrong += ["whiten=true"] if node.get("whiten") else []
        wrong += [f"padding={node.get('padding')}"] if node.get("padding") not in PADDING.values() else []
        if wrong:
            raise Refusal(f"diffusers' pipelines do not read text with {', '.join(wrong)} ({place}); padding is 0 or 49407.")
        found.append(
            (node, _cut(bundle.parts[place], 1 if layers == [-2] and norm else 0, node.get("pooled", False) and not plain))
        )
    return found


def _readable(several: bool) -> list[tuple[list[int], bool]]:
    return [([-2], False)] if several else [([-1], True), ([-2], True)]


def _cut(part: Part, layers: int, pooled: bool) -> Part:
    """A tower without its last blocks, and without a projection that nobody reads."""
    text = dict(part.config["text_cfg"])
    text["layers"] -= layers
    last = tuple(f"transformer.resblocks.{text['layers'] + i}." for i in range(layers))
    weights = {n: x for n, x in part.weights.items() if not (last and n.startswith(last))}
    if not pooled:
        text["proj_type"] = "none"
        weights.pop("text_projection", None)
    return Part({**part.config, "text_cfg": text}, weights, kind="clip")


def write_text_tower(node: Mapping[str, Any], part: Part, folder: Path, slot: str) -> None:
    """Into its `slot`."""
    encoder, tokenizer = folder / f"text_encoder{slot}", folder / f"tokenizer{slot}"
    write_json(transformers_config(part.config), encoder / "config.json")
    save_tensors(give(transformers(part.weights), part.weights), encoder / "model.safetensors")
    length = part.config["text_cfg"]["context_length"]
    write_tokenizer(tokenizer, node["padding"], node.get("learned", ()), length)


def _today(name: str) -> str:
    """Text encoders of old, and the latest, are saved without their prefix."""
    return PREFIX + name if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")) else name
