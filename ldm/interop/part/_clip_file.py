"""Text towers within CompVis' and Stability's single files."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.interop.bundle import Part
from ldm.interop.part._towers import text_node, tower_shapes
from ldm.interop.part._transformers import PREFIX, transformers
from ldm.interop.tie import bring, give, same, taken

TOWERS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
SD3 = ("text_encoders.clip_l.", "text_encoders.clip_g.")


FULL = {768: 12, 1024: 24, 1280: 32}  # the blocks of the published towers, by width


def named_as_today(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; those of transformers' text towers with the prefix that older, and the latest, versions leave out."""
    places, pieces = (*TOWERS, *SD3), ("embeddings", "encoder", "final_layer_norm")
    bare = tuple(f"{prefix}transformer.{piece}." for prefix in places for piece in pieces)
    return {n.replace("transformer.", f"transformer.{PREFIX}", 1) if n.startswith(bare) else n: x for n, x in weights.items()}


def read_texts(weights: Mapping[str, Tensor], layer: int | None = None) -> tuple[dict[str, Any], dict[str, Part], set[str]]:
    """The conditions, their towers by sub-folder, and the names that were used.

    `layer` is the hidden state of an only tower, of Stable Diffusion 1 or 2, that is read, where something says so.
    """
    found = [(prefix, _read_tower(weights, prefix)) for prefix in (*TOWERS, *SD3) if any(n.startswith(prefix) for n in weights)]
    found = [(prefix, part, used) for prefix, (part, used) in found if part is not None]
    read = set().union(*(used for _, _, used in found)) if found else set()
    if [prefix for prefix, _, _ in found] == [TOWERS[0]]:
        part = found[0][1]
        first = {"layers": [layer or -1], "padding": 49407}
        if not part.config["quick_gelu"]:
            first = {"layers": _last_but_one(part) if layer is None or _trimmed(part) else [layer], "padding": 0}
        node = text_node("condition.text", final_norm=True, **first)
        return {"text": node}, {"condition.text": part}, read
    if [prefix for prefix, _, _ in found] == [SD3[0]]:  # Flux: a vector alone
        node = text_node("condition.text", layers=[], pooled=True, projected=False, padding=49407)
        return {"text": node}, {"condition.text": found[0][1]}, read
    nodes, parts = {}, {}
    third = any(prefix in SD3 for prefix, _, _ in found)
    for _, part, _ in found:
        name = "large" if part.config["quick_gelu"] else "giant"
        place = f"condition.text.towers.{name}"
        if third:
            pads = 49407 if name == "large" else 0
            nodes[name] = text_node(place, layers=[-2], final_norm=False, pooled=True, padding=pads)
            parts[place] = part
            continue
        giant = {"pooled": True, "padding": 0} if name == "giant" else {"padding": 49407}
        nodes[name] = text_node(place, layers=_last_but_one(part), final_norm=False, dropped="zeros", **giant)
        parts[place] = part
    text = {"_target_": "ldm.condition.text.Texts", "towers": nodes}
    return ({"text": text} if nodes else {}), parts, read


def _trimmed(part: Part) -> bool:
    """Whether a published tower lacks its last block, which nobody reads, as diffusers' own script writes it."""
    text = part.config["text_cfg"]
    return text["layers"] == FULL.get(text["width"], 0) - 1


def _last_but_one(part: Part) -> list[int]:
    """The hidden state before the whole tower's last block."""
    return [-1] if _trimmed(part) else [-2]


def _read_tower(weights: Mapping[str, Tensor], prefix: str) -> tuple[Part | None, set[str]]:
    """transformers' layout below `transformer.`, with OpenAI's activation, or open_clip's below `model.`."""
    foreign, openai = any(name.startswith(f"{prefix}transformer.{PREFIX}") for name in weights), prefix != SD3[1]
    prefix += "transformer." if foreign else "model."
    shapes = {name.removeprefix(prefix): tuple(weights[name].shape) for name in weights if name.startswith(prefix)}
    if not shapes:
        return None, set()
    embeddings = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    vocabulary, context = [PREFIX + e for e in embeddings] if foreign else ["token_embedding.weight", "positional_embedding"]
    width = shapes[vocabulary][1]
    projection = shapes.get("text_projection.weight" if foreign else "text_projection")
    last = PREFIX + "encoder.layers.{}.layer_norm1.weight" if foreign else "transformer.resblocks.{}.ln_1.weight"
    text = {"context_length": shapes[context][0], "vocab_size": shapes[vocabulary][0], "width": width}
    text |= {"heads": max(1, width // 64), "layers": next(i for i in range(1000) if last.format(i) not in shapes)}
    config = {
        "embed_dim": projection[0 if foreign else -1] if projection else width,
        "quick_gelu": foreign and openai,
        "text_cfg": text,
    }
    if projection is None:
        text["proj_type"] = "none"
    wanted = tower_shapes(config)
    ties = transformers(wanted) if foreign else {name: same(name) for name in wanted}
    return Part(config, bring(ties, weights, wanted, prefix), kind="clip"), taken(ties, prefix)


def write_plain(part: Part, prefix: str) -> dict[str, Tensor]:
    """A tower's tensors below `prefix` in transformers' layout, all of them: as in files of Stable Diffusion 3."""
    return give(transformers(part.weights), part.weights, f"{prefix}transformer.")


def write_tower(part: Part, prefix: str, layers: list[int]) -> dict[str, Tensor]:
    """A tower's tensors below `prefix`: OpenAI's in transformers' layout, others in open_clip's; `layers` are those read."""
    if part.config.get("quick_gelu"):
        weights = {name: x for name, x in part.weights.items() if name != "text_projection"}
        return give(transformers(weights), weights, f"{prefix}transformer.")
    theirs = {f"{prefix}model.{name}": x for name, x in part.weights.items()}
    if layers == [-1]:  # their code reads the last block but one: the last one here gets a double above it, never read
        count = part.config["text_cfg"]["layers"]
        last, above = (f"{prefix}model.transformer.resblocks.{i}." for i in (count - 1, count))
        theirs |= {above + name.removeprefix(last): x.clone() for name, x in theirs.items() if name.startswith(last)}
    return theirs
