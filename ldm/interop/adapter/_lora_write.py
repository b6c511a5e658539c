"""LoRA files, written: kohya's, with what other tools sort by, and diffusers', in PEFT's names alone."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.adapter.lora import LoRA, Update
from ldm.errors import Refusal
from ldm.files.folder import save_tensors
from ldm.interop.adapter._lora_names import Module, modules_of
from ldm.interop.bundle import Bundle
from ldm.interop.find import network_of
from ldm.interop.part._towers import towers
from ldm.interop.protocols import Read

ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1/lora",
    "sd_v2": "stable-diffusion-v2-512/lora",
    "sd_v2_v": "stable-diffusion-v2-768-v/lora",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora",
}


@dataclass(frozen=True)
class Piece:
    """The update of one module of theirs, in their shapes; alpha counts against its own rank."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None


def write(adapter: Read, bundle: Bundle, target: Path, layout: str) -> None:
    """Ours -> a file in kohya's layout, or in diffusers'.

    Raises:
        Refusal: the file's name ends otherwise, or the layout has no place for something in it.
    """
    if target.suffix != ".safetensors":
        raise Refusal(f"{target}: a LoRA in the layout of {layout} is one file; name it FILE.safetensors.")
    settings = {k: v for k, v in adapter.node.items() if k[0] != "_"}
    updates = LoRA(**settings).updates(adapter.tensors)
    pieces = dict(_pieces(updates, bundle, layout))
    tensors, metadata = (_kohya if layout == "kohya" else _diffusers)(pieces, bundle)
    save_tensors(tensors, target, metadata)


def _pieces(updates: Mapping[str, Update], bundle: Bundle, layout: str) -> Iterator[tuple[str, Piece]]:
    """The updates by their names, of which one of ours may be several."""
    family, streams = _family(bundle), network_of(bundle).name != "U-Net"
    known = [item for item in modules_of(bundle).items() if _is_spelling(item[0], layout, family, streams)]
    spelled = {(m.name, m.part): (name, m) for name, m in (known if streams else known[::-1])}
    for name, update in updates.items():
        if (name, 0) not in spelled:
            raise Refusal(f"{name}: the layout of {layout} has no name for it; leave it out by adapter.lora.targets.")
        for part, piece in _split(update, spelled[name, 0][1], bundle.weights):
            yield spelled[name, part][0], piece


def _is_spelling(name: str, layout: str, family: str | None, streams: bool) -> bool:
    """Whether a name is the one that is written: of XL's network, and last of transformers' (`streams`), kohya writes the
    published names, of others diffusers'.
    """
    if layout == "diffusers":
        places = ("unet.", "transformer.", "text_encoder.text_model.", "text_encoder_2.text_model.")
        return name.startswith(places) and ".processor." not in name and not name.endswith(".to_out")
    if name.startswith("lora_te"):
        first = "lora_te1_" if streams or family == "sdxl_base_v1-0" else "lora_te_"
        return name.startswith((f"{first}text_model", "lora_te2_text_model", "lora_te3_"))
    theirs = name.removeprefix("lora_unet_")
    own = ("down_", "up_", "mid_", "conv_", "time_embedding", "add_")  # of diffusers
    return theirs != name and (family != "sdxl_base_v1-0" or not theirs.startswith(own))


def _split(update: Update, module: Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[int, Piece]]:
    """By the rows of theirs; what one of several leaves at zero is left out."""
    there = [x.ndim for x in module.tie.split(torch.empty_like(module.weight(weights), device="meta"))]
    ups = module.tie.split(update.up.flatten(1))
    lengths = [None] * len(ups)
    if update.magnitude is not None:
        columns = update.magnitude.ndim == 2
        lengths = [update.magnitude] if columns else module.tie.split(update.magnitude.reshape(-1, 1))
    for part, (up, dims, length) in enumerate(zip(ups, there, lengths)):
        up, down = up.flatten(1), update.down if part == 0 else update.down.clone()  # a file holds no tensor twice
        used = up.any(dim=0)
        if len(ups) > 1 and update.up.any() and not used.all():
            if not used.any() and length is None:
                continue
            up, down = up[:, used], down[used]
        ones = (1,) * (dims - 2)
        down = down.reshape(len(down), -1, *(down.shape[2:] or ones))
        length = None if length is None else length.flatten(1).reshape(*length.flatten(1).shape, *ones)
        yield part, Piece(down, up.reshape(*up.shape, *ones), update.scale * len(down), length)


def _kohya(pieces: Mapping[str, Piece], bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for name, piece in pieces.items():
        tensors |= {f"{name}.lora_down.weight": piece.down, f"{name}.lora_up.weight": piece.up}
        tensors[f"{name}.alpha"] = torch.tensor(piece.alpha)
        tensors |= {} if piece.magnitude is None else {f"{name}.dora_scale": piece.magnitude}
    ranks, alphas = (Counter(values).most_common(1)[0][0] for values in _ranks_and_alphas(pieces))
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(ranks), "ss_network_alpha": f"{alphas:g}"}
    if (family := _family(bundle)) is not None:
        metadata |= {"ss_base_model_version": family, "ss_v2": str(family.startswith("sd_v2"))}
        metadata["modelspec.architecture"] = ARCHITECTURES[family]
    return tensors, metadata


def _ranks_and_alphas(pieces: Mapping[str, Piece]) -> tuple[list[int], list[float]]:
    return [len(piece.down) for piece in pieces.values()], [piece.alpha for piece in pieces.values()]


def _diffusers(pieces: Mapping[str, Piece], bundle: Bundle) -> tuple[dict[str, Tensor], dict[str, str]]:
    """alpha / rank is folded into B, so that readers that know no alpha are right; settings are said only where ranks differ."""
    tensors = {}
    for name, piece in pieces.items():
        scale = piece.alpha / len(piece.down)
        tensors |= {f"{name}.lora_A.weight": piece.down, f"{name}.lora_B.weight": piece.up if scale == 1 else piece.up * scale}
        if piece.magnitude is not None:
            if len(piece.magnitude) != len(piece.up):
                raise Refusal(f"{name}: its magnitudes are of input columns, which PEFT and diffusers have not. Use --to kohya.")
            shape = (1, -1, 1, 1) if piece.magnitude.ndim == 4 else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = piece.magnitude.reshape(shape)
    if len({len(piece.down) for piece in pieces.values()}) == 1:
        return tensors, {}
    told = {}
    for part in dict.fromkeys(name.partition(".")[0] for name in pieces):
        ranks = {n.removeprefix(f"{part}."): len(p.down) for n, p in pieces.items() if n.startswith(f"{part}.")}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {name: rank for name, rank in ranks.items() if rank != usual}
        settings = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
        settings |= {"target_modules": list(ranks)}
        settings["use_dora"] = any(p.magnitude is not None for p in pieces.values())
        told |= {f"{part}.{key}": value for key, value in settings.items()}
    return tensors, {"lora_adapter_metadata": json.dumps(told)}


def _family(bundle: Bundle) -> str | None:
    """What kohya's scripts call the family of a model; None where they have no word for it."""
    network = network_of(bundle)
    tokens = network.tokens(bundle) if network.name == "U-Net" else None
    if bundle.made_by("ldm.condition.number.Number") is not None and len(towers(bundle.recipe["condition"])) == 2:
        return "sdxl_base_v1-0"
    velocity = bundle.recipe["prediction"]["_target_"].endswith("Velocity")
    return {768: "sd_v1", 1024: "sd_v2_v" if velocity else "sd_v2"}.get(tokens)
