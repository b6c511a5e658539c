"""LoRA files: kohya's (A1111, ComfyUI), diffusers' of every spelling, PEFT's folders; LoCon's kernels and DoRA's magnitudes.

Each name in a file is looked up among those that the model's own weights have in each layout; none is taken apart and guessed.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.adapter.lora import NAME
from ldm.errors import Refusal
from ldm.interop.adapter._lora_names import Module, modules_of
from ldm.interop.adapter._lora_write import write
from ldm.interop.bundle import Bundle
from ldm.interop.foreign import Foreign
from ldm.interop.protocols import AdapterKind, Read
from ldm.interop.weights import check_numbers

TARGET = "ldm.adapter.lora.LoRA"
DOWN, UP, MID, ALPHA, MAGNITUDE = "lora_down", "lora_up", "lora_mid", "alpha", "dora_scale"  # kohya's words for the parts
PARTS = {
    DOWN: r"(?:\.lora_down|\.lora_A(?:\.default)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight",
    UP: r"(?:\.lora_up|\.lora_B(?:\.default)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight",
    MID: r"\.lora_mid\.weight",
    ALPHA: r"\.alpha",
    MAGNITUDE: r"\.dora_scale|\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
}
KEY = re.compile(rf"(?P<module>.+?)(?:{'|'.join(f'(?P<{part}>{ends})' for part, ends in PARTS.items())})")
OTHERS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", ".on_input": "IA3", ".diff": "full difference", ".w_norm": "norm"}
FAMILIES = {"sd_v1": "Stable Diffusion 1", "sd_v2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
Found = dict[str, Tensor]  # what a file holds of one module, by kohya's words


class LoRAFile(AdapterKind):
    """Low-rank updates of a network and of its text towers."""

    adapter = "lora"
    word = "a LoRA"
    layouts = ("kohya", "diffusers")
    file = "pytorch_lora_weights.safetensors"

    def owns(self, name: str) -> bool:
        """By the end of its name."""
        return NAME.fullmatch(name) is not None

    def recognise(self, source: Foreign) -> bool:
        """By the factors' names, or those of its relatives, which are refused by name."""
        words = ("lora_", ".lora.", "_lora.", *OTHERS)
        return any(word in name for name in source.names for word in words[:3]) or any(
            f".{other}" in name or other in name for name in source.names for other in ("hada_", "lokr_", "oft_")
        )

    def read(self, source: Foreign, bundle: Bundle, name: str | None) -> Read:
        """Every key of it is used, or named."""
        found = _grouped(source)
        known = modules_of(bundle)
        _check_known(found, known, source)
        _check_shapes(found, known, bundle, source)
        alphas = _alphas(source, found)
        parts: dict[str, dict[int, tuple[Module, Found, float]]] = {}
        for theirs, factors in found.items():
            module = known[theirs]
            if module.part in parts.setdefault(module.name, {}):
                raise Refusal(f"{source.path}: {theirs} is there twice, by two spellings.")
            parts[module.name][module.part] = (module, factors, alphas[theirs])
        tensors: dict[str, Tensor] = {}
        for ours, pieces in parts.items():
            tensors |= {f"{ours}.{leaf}": x for leaf, x in _joined(pieces, bundle.weights, f"{source.path}: {ours}").items()}
        ranks = [len(x) for n, x in tensors.items() if n.endswith("lora_A.default.weight")]
        settings = {"rank": max(ranks), "targets": "all", "dora": any("magnitude" in n for n in tensors)}
        settings["text"] = any(n.startswith("conditioner.") for n in tensors)
        return Read({"_target_": TARGET, **settings}, tensors, _said(source, found, ranks))

    write = staticmethod(write)


def _grouped(source: Foreign) -> dict[str, Found]:
    """The tensors by module, each whole.

    Raises:
        Refusal: a key is of another kind of update, one factor lacks the other, ranks differ, or a number is not finite.
    """
    check_numbers(source.weights, source.path)
    found: dict[str, Found] = {}
    for name, x in source.weights.items():
        key = KEY.fullmatch(name)
        other = next((kind for word, kind in OTHERS.items() if word in name), None)
        if key is None:
            what = f"holds {other} updates ({name})" if other else f"holds {name}, which is no part of an update"
            raise Refusal(f"{source.path} {what}; LoRA, LoCon and DoRA are known.")
        part = next(part for part in PARTS if key[part])
        found.setdefault(key["module"], {})[part] = _lengths(x.float(), name) if part == MAGNITUDE else x.float()
    for module, factors in found.items():
        if missing := [part for part in (UP, DOWN) if part not in factors]:
            raise Refusal(f"{source.path}: {module}.{missing[0]}.weight is missing.")
        down, up = factors[DOWN], factors[UP]
        if MID in factors:  # Tucker's core
            core = torch.einsum("rjhw,ji->rihw", factors.pop(MID), down.flatten(1))
            factors[DOWN] = down = core
        if up.ndim < 2 or len(down) != up.shape[1]:
            raise Refusal(f"{source.path}: {module}: lora_down has rank {len(down)}, lora_up rank {up.shape[1]}.")
    return found


def _lengths(x: Tensor, name: str) -> Tensor:
    """DoRA's lengths in the one or the other shape: of each row, (out, 1), or of each input column, (1, in)."""
    columns = ".dora_scale" in name and x.ndim > 1 and len(x) == 1
    return x.reshape(1, -1) if columns else x.reshape(-1, 1)


def _check_known(found: Mapping[str, Found], known: Mapping[str, Module], source: Foreign) -> None:
    lost = [module for module in found if module not in known]
    if not lost:
        return
    if len(lost) == len(found):
        raise Refusal(f"{source.path}: none of its {len(found)} updates is of this model (first: {lost[0]}){_family(source)}.")
    near = difflib.get_close_matches(lost[0], list(known), n=1, cutoff=0.0)
    raise Refusal(
        f"{source.path}: {len(lost)} of its {len(found)} updates are of nothing here: {', '.join(lost[:3])}; nearest: "
        f"{', '.join(near)}{_family(source)}."
    )


def _check_shapes(found: Mapping[str, Found], known: Mapping[str, Module], bundle: Bundle, source: Foreign) -> None:
    wrong = {}
    for theirs, factors in found.items():
        there = (len(factors[UP]), *factors[DOWN].shape[1:])
        here = known[theirs].shape(bundle.weights)
        if (there[0], factors[DOWN][0].numel()) != (here[0], torch.Size(here[1:]).numel()):
            wrong[theirs] = (there, here)
    if wrong:
        theirs, (there, here) = next(iter(wrong.items()))
        raise Refusal(
            f"{source.path}: {len(wrong)} of its {len(found)} updates do not fit this model: {theirs} is {there} there and "
            f"{here} here{_family(source)}."
        )


def _family(source: Foreign) -> str:
    """Of which family a file says that it is."""
    said = source.metadata.get("ss_base_model_version") or source.metadata.get("modelspec.architecture") or ""
    name = next((name for word, name in FAMILIES.items() if said.startswith(word)), None)
    return f"; it is for {name} (ss_base_model_version={said})" if name else f"; it is for {said}" if said else ""


def _alphas(source: Foreign, found: Mapping[str, Found]) -> dict[str, float]:
    """alpha of each module: the file's, else what its settings say, else its rank.

    Raises:
        Refusal: one is 0, or its settings scale in a way that is not known.
    """
    told = {"": source.config("adapter_config.json")}
    for name, value in source.said("lora_adapter_metadata").items():
        part, _, key = name.partition(".")
        told.setdefault(part, {})[key] = value
    alphas = {}
    for module, factors in found.items():
        part = module.partition(".")[0]
        settings = told.get(part) or told[""]
        alphas[module] = float(factors[ALPHA]) if ALPHA in factors else _said_alpha(settings, module, len(factors[DOWN]), source)
        if alphas[module] == 0:
            raise Refusal(f"{source.path}: {module}: alpha 0 would make it nothing.")
    return alphas


def _said_alpha(settings: Mapping[str, Any], module: str, rank: int, source: Foreign) -> float:
    if strange := [name for name in ("fan_in_fan_out", "lora_bias", "alora_invocation_tokens") if settings.get(name)]:
        raise Refusal(f"{source.path}: its adapter_config.json has {strange[0]}={settings[strange[0]]}, which is not known.")
    patterns = settings.get("alpha_pattern") or {}
    match = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    alpha = settings.get("lora_alpha") if match is None else patterns[match]
    if alpha is None:
        return float(rank)
    return float(alpha) * (rank**0.5 if settings.get("use_rslora") else 1.0)


def _joined(pieces: Mapping[int, tuple[Module, Found, float]], weights: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The updates of all that one module of ours is elsewhere -> its one update, by the leaves of our names."""
    module = next(iter(pieces.values()))[0]
    here, rows = module.shape(weights, whole=True), module.rows(weights)
    ups = [pieces[i][1][UP].flatten(1) if i in pieces else None for i in range(len(rows))]
    scales = [pieces[i][2] / ups[i].shape[1] if i in pieces else 1.0 for i in range(len(rows))]
    same = len({scale for i, scale in enumerate(scales) if i in pieces}) == 1
    rank = sum(up.shape[1] for up in ups if up is not None)
    padded, at = [], 0
    for count, up, scale in zip(rows, ups, scales):
        whole = torch.zeros(count, rank)
        if up is not None:
            whole[:, at : at + up.shape[1]] = up if same else up * scale
            at += up.shape[1]
        padded.append(whole)
    down = torch.cat([pieces[i][1][DOWN].reshape(-1, *here[1:]) for i in sorted(pieces)])
    up = module.tie.join(*padded)
    made = {"lora_A.default.weight": down, "lora_B.default.weight": up.reshape(*up.shape, *(1,) * (len(here) - 2))}
    made["lora_alpha"] = torch.tensor(next(s for i, s in enumerate(scales) if i in pieces) * rank if same else float(rank))
    if any(MAGNITUDE in factors for _, factors, _ in pieces.values()):
        made["lora_magnitude_vector.default.weight"] = _magnitude(pieces, module, weights, place)
    return made


def _magnitude(
    pieces: Mapping[int, tuple[Module, Found, float]], module: Module, weights: Mapping[str, Tensor], place: str
) -> Tensor:
    """DoRA's lengths: of each row, (out), or, as older files have them, of each input column, (1, in)."""
    rows = module.rows(weights)
    own = module.tie.split(module.weight(weights).flatten(1))  # whose lengths stay where a part has none
    lengths = []
    for i, count in enumerate(rows):
        said = pieces[i][1].get(MAGNITUDE) if i in pieces else None
        if said is None:
            lengths.append(own[i].flatten(1).norm(dim=1, keepdim=True))
        elif said.shape == (count, 1):
            lengths.append(said)
        elif len(rows) == 1:
            return said
        else:
            raise Refusal(f"{place}: one of its magnitudes is of input columns, which several matrices in one have not.")
    return module.tie.join(*lengths).flatten()


def _said(source: Foreign, found: Mapping[str, Found], ranks: list[int]) -> tuple[str, ...]:
    """What is told of a file that was read."""
    kohya = any(name.startswith("lora_unet_") or name.startswith("lora_te") for name in found)
    low, high = min(ranks), max(ranks)
    lines = [f"{source.path}: {len(found)} updates of rank {low if low == high else f'{low} to {high}'}"]
    if kohya and not any(ALPHA in factors for factors in found.values()):
        lines.append(f"{source.path}: no alpha: alpha = rank, as old files mean")
    return tuple(lines)


KIND = LoRAFile()
