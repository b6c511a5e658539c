"""The first stages' tensors, KL and VQ, by CompVis' names and by diffusers', and their settings read off the shapes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import Refusal
from ldm.interop.tie import Tie, kernel, renamer, same, tied

STATISTICS = ("mean", "std", "count", "hits", "sums")  # ours alone
MIDDLE = {"0": ("block_1", "resnets.0"), "1": ("attn_1", "attentions.0"), "2": ("block_2", "resnets.1")}
COMPVIS = renamer({"skip": "nin_shortcut", "out": "proj_out"})
RESNET = renamer({"skip": "conv_shortcut"})
ATTENTION = renamer({"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"})
DEPRECATED = renamer({"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"})


def compvis(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Tie]:
    """Our names -> CompVis', below `first_stage_model.`."""
    levels = len(settings["mult"])

    def tie(name: str) -> Tie:
        if name == "codebook":
            return same("quantize.embedding.weight")
        place = _place(name)
        if place is None:
            return same(name)
        side, level, j, tail = place
        if level is None:
            theirs = f"{side}.mid.{MIDDLE[j][0]}.{COMPVIS(tail)}"
        else:
            number, kind = int(level) if side == "encoder" else levels - 1 - int(level), "down" if side == "encoder" else "up"
            part = _part(j, tail, settings, side, level, {"sample": f"{kind}sample.conv", "block": "block", "attend": "attn"})
            theirs = f"{side}.{kind}.{number}.{part}.{COMPVIS(tail)}"
        return kernel(theirs, 2) if tail in ("q.weight", "k.weight", "v.weight", "out.weight") else same(theirs)

    return tied((n for n in names if n not in STATISTICS), tie)


def diffusers(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Tie]:
    """Our names -> those of diffusers' AutoencoderKL and VQModel."""

    def tie(name: str) -> Tie:
        if name == "codebook":
            return same("quantize.embedding.weight")
        place = _place(name)
        if place is None:
            return same(name.replace("norm_out", "conv_norm_out"))
        side, level, j, tail = place
        if level is None:
            return same(f"{side}.mid_block.{MIDDLE[j][1]}.{ATTENTION(tail) if j == '1' else RESNET(tail)}")
        kind = "down" if side == "encoder" else "up"
        words = {"sample": f"{kind}samplers.0.conv", "block": "resnets", "attend": "attentions"}
        renamed = ATTENTION(tail) if _attends(tail) else RESNET(tail)
        return same(f"{side}.{kind}_blocks.{level}.{_part(j, tail, settings, side, level, words)}.{renamed}")

    return tied((n for n in names if n not in STATISTICS), tie)


def settings_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """CompVis' names (below `first_stage_model.`) and shapes -> how `KL` or `VQ` is built, `_target_` with it.

    Raises:
        Refusal: this is no such autoencoder.
    """
    try:
        width, levels = shapes["encoder.conv_in.weight"][0], 1 + max(_numbers(shapes, r"encoder\.down\.(\d+)\..+"))
        found = {
            "channels": shapes["post_quant_conv.weight"][1],
            "width": width,
            "mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // width for i in range(levels)],
            "res_blocks": 1 + max(_numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\..+")),
            "attention": sorted(set(_numbers(shapes, r"encoder\.down\.(\d+)\.attn\..+"))),
        }
    except (KeyError, ValueError) as error:
        found = f"{error} is missing" if isinstance(error, KeyError) else "levels are missing"
        raise Refusal(f"This is no autoencoder in CompVis' layout: {found} among its tensors.") from error
    codes = shapes.get("quantize.embedding.weight")
    if codes is None:
        return {"_target_": "ldm.autoencoder.kl.KL", **found}
    return {"_target_": "ldm.autoencoder.vq.VQ", **found, "codes": codes[0]}


def _place(name: str) -> tuple[str, str | None, str, str] | None:
    """encoder.levels.0.1.conv1.weight -> encoder, 0, 1, conv1.weight; decoder.middle.1.q.weight -> decoder, None, 1, q.weight."""
    found = re.fullmatch(r"(encoder|decoder)\.(?:levels\.(\d+)|middle)\.(\d+)\.(.+)", name)
    return None if found is None else (found[1], found[2], found[3], found[4])


def _part(j: str, tail: str, settings: Mapping[str, Any], side: str, level: str, words: Mapping[str, str]) -> str:
    """What the j-th layer of a level is, and its number among its kind: residual blocks and attentions take turns."""
    if tail in ("weight", "bias"):
        return words["sample"]
    depth = int(level) if side == "encoder" else len(settings["mult"]) - 1 - int(level)
    step = 2 if depth in settings.get("attention", ()) else 1
    return f"{words['attend' if _attends(tail) else 'block']}.{int(j) // step}"


def _attends(tail: str) -> bool:
    return tail.split(".")[0] in ("norm", "q", "k", "v", "out")


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return [int(found[1]) for found in (re.fullmatch(pattern, name) for name in names) if found]
