"""ControlNets: lllyasviel's single files, with their control part alone or whole, and diffusers' folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.adapter.controlnet import HINT, NET
from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_json
from ldm.interop.bundle import Bundle
from ldm.interop.find import network_of
from ldm.interop.foreign import Foreign
from ldm.interop.protocols import AdapterKind, Network, Read
from ldm.interop.tie import Tie, bring, give, same, taken
from ldm.interop.weights import check_numbers

NODE = {"_target_": "ldm.adapter.controlnet.ControlNet", "guess": False}
HINTS = {"_target_": "ldm.condition.hint.Hint", "_partial_": True}
SINGLE, FOLDER = "input_hint_block.", "controlnet_cond_embedding."  # where the hint's convolutions begin
CONTROL = "control_model."
FILE = "diffusion_pytorch_model.safetensors"
# What a file holds that is called a ControlNet and is another thing, and its name.
RELATIVES = {
    "lora_controlnet": "a Control-LoRA",
    "lllite_": "a ControlNet-LLLite",
    "task_embedding": "a ControlNet Union",
    "control_add_embedding.": "a ControlNet Union",
    "ctrl_to_base_": "a ControlNet-XS",
    "difference": "a difference ControlNet, which is added to the weights of a base",
    "controlnet_x_embedder.": "a ControlNet of a transformer",
}
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # by the width of their tokens
LEFT = ("model.", "first_stage_model.", "cond_stage_model.", "model_ema.")  # of a whole model with a ControlNet in it
OWN = {"_class_name", "conditioning_channels", "conditioning_embedding_out_channels", "controlnet_conditioning_channel_order"}
OWN |= {"global_pool_conditions", "mid_block_type"}  # keys that a U-Net's config has not, or says otherwise


class ControlNetFile(AdapterKind):
    """A copy of a U-Net's first half beside it."""

    adapter = "controlnet"
    word = "a ControlNet"
    named = True
    layouts = ("compvis", "diffusers")
    file = "controlnet"

    def owns(self, name: str) -> bool:
        """By its beginning."""
        return NET.fullmatch(name) is not None or HINT.fullmatch(name) is not None

    def recognise(self, source: Foreign) -> bool:
        """By the names of the hint's convolutions, or those of its relatives, which are refused by name."""
        return any(SINGLE in name or name.startswith(FOLDER) for name in source.names) or _relative(source) is not None

    def read(self, source: Foreign, bundle: Bundle, name: str | None) -> Read:
        """Every tensor of it is used, or named."""
        if (other := _relative(source)) is not None:
            raise Refusal(f"{source.path} is {other}; whole ControlNets of Stable Diffusion 1, 2 and XL are known.")
        check_numbers(source.weights, source.path)
        network, name = _network(bundle), name or "control"
        single = not any(key.startswith(FOLDER) for key in source.weights)
        prefix = CONTROL if any(key.startswith(CONTROL) for key in source.weights) else ""
        told = _said_by_yaml(source.path) if single else _said_by_config(source, network, bundle)
        ties = ties_of(network, bundle, single, _hint_layers(source.weights, single, prefix))
        kept = {key: x for key, x in source.weights.items() if not prefix or key.startswith(prefix)}
        if lost := sorted(kept.keys() - taken(ties, prefix)):
            raise Refusal(f"{source.path}: {len(lost)} of its tensors are of nothing here, such as {lost[0]}{_family(kept)}.")
        if strange := [key for key in source.weights if key not in kept and "." in key and not key.startswith(LEFT)]:
            raise Refusal(f"{source.path}: {strange[0]} is of no ControlNet, nor of the model around it.")
        try:
            tensors = bring(ties, kept, _shapes(ties, kept, prefix, bundle), prefix)
        except Refusal as error:
            raise Refusal(f"{source.path} is a ControlNet of another U-Net: {error}{_family(kept)}.") from error
        channels = [len(tensors[f"layers.{i}.weight"]) for i in range(0, _last(tensors), 4)]
        node = {**NODE, "name": name, "pool": told["pool"], "hint": {**HINTS, "channels": channels, "order": told["order"]}}
        named = {_place(ours, name): x.float() for ours, x in tensors.items()}
        return Read(node, named, (_said(source, named, len(kept)),))

    def write(self, adapter: Read, bundle: Bundle, target: Path, layout: str) -> None:
        """One file in lllyasviel's layout, or a folder in diffusers'; neither says that it guesses.

        Raises:
            Refusal: the file's name ends otherwise, or a setting has no place there.
        """
        network, single = _network(bundle), layout == "compvis"
        found = {(NET.fullmatch(n) or HINT.fullmatch(n))[1]: x for n, x in adapter.tensors.items()}
        theirs = give(ties_of(network, bundle, single, _last(found)), found, CONTROL if single else "")
        hint, pool = adapter.node["hint"], adapter.node.get("pool", False)
        if adapter.node.get("guess"):
            print(f"{target}: the layout of {layout} does not say guess: adapters=...:guess here, guess_mode=True in diffusers.")
        if single:
            if target.suffix != ".safetensors":
                raise Refusal(f"{target}: a ControlNet in the layout of {layout} is one file; name it FILE.safetensors.")
            if pool or hint.get("order", "rgb") != "rgb":
                raise Refusal("the layout of compvis says neither pool nor order of a ControlNet: use --to diffusers.")
            save_tensors(theirs, target)
            return
        settings = network.config(network.settings(bundle), bundle)
        config = {k: v for k, v in settings.items() if k not in ("up_block_types", "out_channels", "sample_size")}
        config |= {"_class_name": "ControlNetModel", "conditioning_channels": 3, "mid_block_type": "UNetMidBlock2DCrossAttn"}
        config |= {"in_channels": found["copy.encoder.0.0.weight"].shape[1], "global_pool_conditions": pool}
        config["conditioning_embedding_out_channels"] = [len(found[f"layers.{i}.weight"]) for i in range(0, _last(found), 4)]
        config["controlnet_conditioning_channel_order"] = hint.get("order", "rgb")
        save_tensors(theirs, target / FILE)
        write_json(config, target / "config.json")


def _relative(source: Foreign) -> str | None:
    return next((word for key, word in RELATIVES.items() if any(name.startswith(key) for name in source.names)), None)


def _network(bundle: Bundle) -> Network:
    network = network_of(bundle)
    if network.name != "U-Net":
        raise Refusal(f"a ControlNet needs an encoder with skips; this backbone is a {network.name}.")
    return network


def ties_of(network: Network, bundle: Bundle, single: bool, last: int) -> dict[str, Tie]:
    """Our names, without where they stand in the model, -> theirs. `last` is the hint's last convolution."""
    names = [name for name in bundle.backbone() if not name.startswith(("decoder.", "out."))]
    settings, kind = network.settings(bundle), bundle.recipe["prediction"]["_target_"].split(".")[-1]
    half = network.single_ties(names, settings, kind) if single else network.diffusers_ties(names, settings)
    ties = {f"copy.{name}": tie for name, tie in half.items()}
    stages = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("encoder."))
    zeros, middle = ("zero_convs.{}.0", "middle_block_out.0") if single else ("controlnet_down_blocks.{}", "controlnet_mid_block")
    places = {f"zeros.{i}": zeros.format(i) for i in range(stages)} | {"zero_middle": middle}
    inner = {i: f"{SINGLE}{i}" if single else f"{FOLDER}blocks.{i // 2 - 1}" for i in range(0, last + 1, 2)}
    if not single:
        inner |= {0: f"{FOLDER}conv_in", last: f"{FOLDER}conv_out"}
    places |= {f"layers.{i}": theirs for i, theirs in inner.items()}
    return ties | {f"{ours}.{end}": same(f"{theirs}.{end}") for ours, theirs in places.items() for end in ("weight", "bias")}


def _hint_layers(weights: Mapping[str, Tensor], single: bool, prefix: str) -> int:
    """The number of the hint's last convolution, in lllyasviel's count."""
    if single:
        begin = prefix + SINGLE
        return max(int(n.removeprefix(begin).split(".")[0]) for n in weights if n.startswith(begin))
    return 2 + 2 * sum(n.startswith(f"{FOLDER}blocks.") and n.endswith(".weight") for n in weights)


def _last(tensors: Mapping[str, Tensor]) -> int:
    return max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))


def _shapes(ties: Mapping[str, Tie], theirs: Mapping[str, Tensor], prefix: str, bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """What is wanted: of the copy the base's own shapes, but for how many channels it is told, and what is there of the rest."""
    base = {f"copy.{name}": tuple(x.shape) for name, x in bundle.backbone().items()}
    shapes = {}
    for ours, tie in ties.items():
        there = theirs.get(prefix + tie.theirs[0])
        shapes[ours] = base.get(ours, () if there is None else tuple(there.shape))
        if ours == "copy.encoder.0.0.weight" and there is not None and there.shape[1:2] <= base[ours][1:2]:
            shapes[ours] = (base[ours][0], there.shape[1], *base[ours][2:])
    return shapes


def _said_by_config(source: Foreign, network: Network, bundle: Bundle) -> dict[str, Any]:
    """What diffusers' config says beside the sizes.

    Raises:
        Refusal: it is no ControlNet's, or its heads are others than the base's.
    """
    config = source.config("config.json")
    kind = config.get("_class_name", "ControlNetModel")
    if kind != "ControlNetModel" or config.get("conditioning_channels", 3) != 3:
        raise Refusal(f"{source.path} is a {kind} told {config.get('conditioning_channels', 3)} channels; ControlNetModel, 3.")
    if config:
        up = [word.replace("Down", "Up") for word in reversed(config["down_block_types"])]
        plain = {k: v for k, v in config.items() if k not in OWN}
        settings = network.read_config({"_class_name": "UNet2DConditionModel", "out_channels": 4, "up_block_types": up, **plain})
        there, here = _heads(settings[0]), _heads(network.settings(bundle))
        if there != here:
            raise Refusal(f"{source.path} has {there} heads, level by level, and this U-Net {here}; it is of another.")
    return {
        "pool": config.get("global_pool_conditions", False),
        "order": config.get("controlnet_conditioning_channel_order", "rgb"),
    }


def _heads(settings: Mapping[str, Any]) -> list[int]:
    """How many heads each level that attends has."""
    if settings["head_width"] is None:
        return [settings["heads"] for depth in settings["depth"] if depth]
    return [settings["width"] * m // settings["head_width"] for m, depth in zip(settings["mult"], settings["depth"]) if depth]


def _said_by_yaml(path: Path) -> dict[str, Any]:
    """What the yaml beside a single file says."""
    beside = path.with_suffix(".yaml")
    told = yaml.safe_load(beside.read_text()) if path.is_file() and beside.is_file() else {}
    params = (told or {}).get("model", {}).get("params", {})
    return {"pool": bool(params.get("global_average_pooling", False)), "order": "rgb"}


def _place(ours: str, name: str) -> str:
    root = f"conditioner.embedders.{name}." if ours.startswith("layers.") else f"denoiser.backbone.nets.{name}."
    return root + ours


def _family(weights: Mapping[str, Tensor]) -> str:
    """Of which family a ControlNet is, by the tokens that it attends to."""
    width = next((x.shape[1] for name, x in weights.items() if name.endswith("attn2.to_k.weight")), 0)
    return f"; it is for {FAMILIES[width]}" if width in FAMILIES else ""


def _said(source: Foreign, tensors: Mapping[str, Tensor], count: int) -> str:
    numbers = sum(torch.Size(x.shape).numel() for x in tensors.values())
    part = "" if count == len(source.weights) else f", the control part of its {len(source.weights):,} tensors"
    return f"{source.path}: a ControlNet of {numbers:,} numbers{part}"


KIND = ControlNetFile()
