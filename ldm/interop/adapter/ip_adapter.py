"""IP-Adapters (tencent-ailab, h94/IP-Adapter): .bin and .safetensors of Stable Diffusion 1 and XL, plain, Plus and full face."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.adapter.ip_adapter import ATTENTION, PROMPT
from ldm.errors import Refusal
from ldm.files.folder import read_json
from ldm.interop.bundle import Bundle, shapes_of
from ldm.interop.files import take_part
from ldm.interop.find import network_of
from ldm.interop.foreign import Foreign
from ldm.interop.part._transformers import open_clip_vision, transformers_vision
from ldm.interop.protocols import AdapterKind, Read
from ldm.interop.tie import Tie, bring, same, taken
from ldm.interop.weights import check_numbers
from ldm.tower.clip import blank_image_tower

TARGET = {"_target_": "ldm.adapter.ip_adapter.IPAdapter"}
PROMPTS = {"_target_": "ldm.condition.image_prompt.ImagePrompt", "_partial_": True}
SEEN, HEARD = "image_proj.", "ip_adapter."
# Where the image tower lies, from the file's own folder: beside it, or, of XL's that are told by the same tower, in the other's.
TOWERS = ("image_encoder", "../models/image_encoder", "../sdxl_models/image_encoder")
TOWER = ("config.json", "model.safetensors")
LEFT = ("vision_model.embeddings.position_ids",)  # computed
# What a file holds that is called an IP-Adapter and is another thing, and its name.
RELATIVES = {
    f"{SEEN}perceiver_resampler.": "an IP-Adapter of faces (FaceID Plus), which is told by a network for faces",
    f"{SEEN}proj.0.weight": "an IP-Adapter of faces (FaceID), which is told by a network for faces",
    f"{HEARD}double_blocks.": "an IP-Adapter of a transformer (Flux)",
    f"{HEARD}0.to_k_ip.weight": "an IP-Adapter of a transformer",
}
FULL = f"{SEEN}proj.3.weight"  # where the full face's norm is
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # by the width of their tokens
ORDER = ("down_blocks", "up_blocks", "mid_block")  # in which diffusers, and so these files, count a U-Net's attentions


class IPAdapterFile(AdapterKind):
    """Keys and values for a picture's tokens, and what makes tokens of a picture."""

    adapter = "ip_adapter"
    word = "an IP-Adapter"
    named = True

    def owns(self, name: str) -> bool:
        """By its beginning and end."""
        return ATTENTION.fullmatch(name) is not None or PROMPT.fullmatch(name) is not None

    def recognise(self, source: Foreign) -> bool:
        """By the names of its two halves."""
        return any(name.startswith((SEEN, HEARD)) for name in source.names)

    def read(self, source: Foreign, bundle: Bundle, name: str | None) -> Read:
        """Every tensor of it is used, or named."""
        if (other := _relative(source)) is not None:
            raise Refusal(f"{source.path} is {other}; plain IP-Adapters, Plus, and those of full faces are known.")
        check_numbers(source.weights, source.path)
        name, places = name or "image_prompt", _attentions(bundle)
        kind, project = _project(source)
        heard = {
            f"{path}.{leaf}.weight": same(f"{HEARD}{2 * i + 1}.to_{leaf}_ip.weight")
            for i, path in enumerate(places)
            for leaf in "kv"
        }
        ties = heard | {f"project.{ours}": tie for ours, tie in project.items()}
        if lost := sorted(source.weights.keys() - taken(ties)):
            raise Refusal(f"{source.path}: {len(lost)} of its tensors are of nothing here, such as {lost[0]}{_family(source)}.")
        backbone = bundle.backbone()
        shapes = {ours: tuple(backbone[ours].shape) for ours in heard}
        shapes |= {
            ours: tuple(source.weights[tie.theirs[0]].shape)
            for ours, tie in ties.items()
            if ours not in heard and tie.theirs[0] in source.weights
        }
        try:
            tensors = bring(ties, source.weights, shapes)
        except Refusal as error:
            raise Refusal(f"{source.path} is an IP-Adapter of another U-Net: {error}{_family(source)}.") from error
        settings = _settings(kind, tensors, next(iter(shapes.values()))[1])
        folder, config = _tower(source, kind, tensors)
        with torch.device("meta"):
            tower = shapes_of(blank_image_tower(config))
        seen = take_part(folder, transformers_vision(tower), tower, "model", LEFT)
        node = {**TARGET, "name": name, "prompt": {**PROMPTS, "tower": config, "kind": kind, **settings}}
        prompt = {f"image_tower.{leaf}": x for leaf, x in seen.items()} | {n: x for n, x in tensors.items() if n not in heard}
        made = {f"conditioner.embedders.{name}.{leaf}": x.float() for leaf, x in prompt.items()}
        for ours in heard:
            path, leaf = ours.removesuffix(".weight").rsplit(".", 1)
            made[f"denoiser.backbone.{path}.prompts.{name}.{leaf}.weight"] = tensors[ours].float()
        return Read(
            node, made, (f"{source.path}: an IP-Adapter ({kind}) of {len(places)} attentions; pictures are seen by {folder}",)
        )


def _relative(source: Foreign) -> str | None:
    found = next((word for key, word in RELATIVES.items() if any(name.startswith(key) for name in source.names)), None)
    return None if FULL in source.names else found


def _attentions(bundle: Bundle) -> list[str]:
    """The U-Net's attentions to a text by our names, in the order in which diffusers counts them."""
    network = network_of(bundle)
    if network.name != "U-Net":
        raise Refusal(f"an IP-Adapter needs a U-Net's attentions to a text; this backbone is a {network.name}.")
    keys = [name for name in bundle.backbone() if name.endswith(".attend_tokens.k.weight")]
    ties = network.diffusers_ties(keys, network.settings(bundle))

    def place(name: str) -> tuple[int, list[int]]:
        theirs = ties[name].theirs[0]
        return ORDER.index(theirs.split(".")[0]), [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", theirs)]

    return [name.removesuffix(".k.weight") for name in sorted(keys, key=place)]


def _project(source: Foreign) -> tuple[str, dict[str, Tie]]:
    """Of which kind its projection is, and our names of its tensors -> theirs.

    Raises:
        Refusal: it is none that is known.
    """
    names = [name.removeprefix(SEEN) for name in source.names if name.startswith(SEEN)]
    if "proj.weight" in names:
        return "linear", {f"{part}.{end}": same(f"{SEEN}{part}.{end}") for part in ("proj", "norm") for end in ("weight", "bias")}
    if FULL in source.names:
        return "mlp", {f"{i}.{end}": same(f"{SEEN}proj.{i}.{end}") for i in (0, 2, 3) for end in ("weight", "bias")}
    if "latents" in names:
        return "resampler", {_resampled(name): same(f"{SEEN}{name}") for name in names}
    raise Refusal(f"{source.path} makes tokens of a picture in a way that is not known here ({', '.join(sorted(names)[:3])}).")


def _resampled(name: str) -> str:
    """layers.0.1.3.weight -> layers.0.feed.3.weight."""
    found = re.fullmatch(r"(layers\.\d+)\.([01])\.(.+)", name)
    if found is None:
        return name
    layer, half, rest = found.groups()
    ours = f"feed.{rest}" if half == "1" else rest.replace("norm1", "norm_seen").replace("norm2", "norm").replace("to_", "")
    return f"{layer}.{ours}"


def _settings(kind: str, tensors: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """What its shapes say."""
    if kind == "linear":
        return {"tokens": len(tensors["project.proj.weight"]) // width}
    if kind == "mlp":
        return {}
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("project.layers."))
    _, tokens, inner = tensors["project.latents"].shape
    return {"tokens": tokens, "inner": inner, "depth": depth}


def _tower(source: Foreign, kind: str, tensors: Mapping[str, Tensor]) -> tuple[Path, dict[str, Any]]:
    """The folder of the image tower whose pictures the projection reads, and its config.

    Raises:
        Refusal: there is none of its width.
    """
    first = {"linear": "project.proj.weight", "resampler": "project.proj_in.weight", "mlp": "project.0.weight"}[kind]
    wanted, key = tensors[first].shape[1], "projection_dim" if kind == "linear" else "hidden_size"
    others: list[str] = []
    for place in TOWERS:
        folder = source.beside(place, TOWER[:1])
        if folder is None:
            continue
        config = read_json(folder / TOWER[0])
        if config.get(key) == wanted:
            source.beside(place, TOWER)  # of a hub's, now its weights
            return folder, open_clip_vision(config, str(folder))
        others.append(f"{folder} ({config.get(key)})")
    there = f"; there are {', '.join(others)}" if others else ""
    raise Refusal(
        f"{source.path} is told by an image tower {wanted} wide, whose folder {TOWERS[0]} (config.json, model.safetensors) was "
        f"looked for beside it{there}. Copy it there from where the IP-Adapter is from."
    )


def _family(source: Foreign) -> str:
    """Of which family it is, by the tokens that it attends to."""
    width = next((x.shape[1] for name, x in source.weights.items() if name.endswith(".to_k_ip.weight")), 0)
    return f"; it is for {FAMILIES[width]}" if width in FAMILIES else ""


KIND = IPAdapterFile()
