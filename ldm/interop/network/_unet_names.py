"""The U-Net's tensors by CompVis' names and by diffusers', and its settings read off their shapes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import Refusal
from ldm.interop.conditions import IDENTITY
from ldm.interop.tie import Tie, headwise, kernel, projection, renamer, same, tied

TRANSFORMER = {
    "blocks": "transformer_blocks",
    "norm_self": "norm1",
    "norm_tokens": "norm2",
    "norm_out": "norm3",
    "attend_self": "attn1",
    "attend_tokens": "attn2",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "feed.wide": "ff.net.0.proj",
    "feed.out": "ff.net.2",
}
COMPVIS = renamer(
    {
        "norm_in": "in_layers.0",
        "conv_in": "in_layers.2",
        "tell.told": "emb_layers.1",
        "tell.norm": "out_layers.0",
        "conv_out": "out_layers.3",
        "skip": "skip_connection",
        **TRANSFORMER,
    }
)
DIFFUSERS = renamer(
    {
        "norm_in": "norm1",
        "conv_in": "conv1",
        "tell.told": "time_emb_proj",
        "tell.norm": "norm2",
        "conv_out": "conv2",
        "skip": "conv_shortcut",
        **TRANSFORMER,
    }
)
RESIDUAL = ("norm_in", "conv_in", "tell", "conv_out", "skip")
COMPVIS_ROOTS = {"encoder": "input_blocks", "middle": "middle_block", "decoder": "output_blocks"}
COMPVIS_ROOTS |= {"level": "time_embed", "vector": "label_emb.0", "out": "out"}
DIFFUSERS_ROOTS = {"level.0": "time_embedding.linear_1", "level.2": "time_embedding.linear_2"}
DIFFUSERS_ROOTS |= {"vector.0": "add_embedding.linear_1", "vector.2": "add_embedding.linear_2"}
DIFFUSERS_ROOTS |= {"out.0": "conv_norm_out", "out.2": "conv_out", "encoder.0.0": "conv_in"}


def linear(settings: Mapping[str, Any]) -> bool:
    """Whether the published networks of such settings enter and leave a transformer by matrices, or by kernels of size 1.

    Stable Diffusion 2, XL and the upscaler do by matrices, LDM's 32-wide heads stand between kernels; the numbers are the same.
    """
    return settings.get("head_width") not in (None, 32) or bool(settings.get("tokens_only"))


def compvis(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Tie]:
    """Our names -> CompVis' and Stability's, below `model.diffusion_model.`."""

    def tie(name: str) -> Tie:
        root, place, tail = _parts(name)
        if root in ("level", "vector", "out"):
            return same(f"{COMPVIS_ROOTS[root]}.{place}.{tail}")
        if tail in ("weight", "bias") and place != "0.0":
            tail = ("op." if root == "encoder" else "conv.") + tail
        theirs = f"{COMPVIS_ROOTS[root]}.{place}.{COMPVIS(tail)}"
        if tail in ("qkv.weight", "proj_out.weight") and not has_transformers(names):
            return kernel(theirs, 1)
        return projection(theirs, linear(settings)) if _is_projection(tail) else same(theirs)

    names = list(names)
    return tied(names, tie)


def diffusers(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Tie]:
    """Our names -> those of diffusers' UNet2DConditionModel, or of its UNet2DModel where there are no tokens."""

    def tie(name: str) -> Tie:
        root, place, tail = _parts(name)
        if (whole := f"{root}.{place}") in DIFFUSERS_ROOTS:
            return same(f"{DIFFUSERS_ROOTS[whole]}.{tail}")
        theirs = _block(root, place, tail, settings["res_blocks"] + 1)
        if not plain or tail.startswith(RESIDUAL) or tail in ("weight", "bias"):
            return projection(theirs + tail, linear(settings)) if _is_projection(tail) else same(theirs + DIFFUSERS(tail))
        part, leaf = tail.split(".")
        if part == "qkv":
            return headwise(_heads_at(root, place, settings), *(f"{theirs}to_{letter}.{leaf}" for letter in "qkv"))
        return same(theirs + {"norm": "group_norm", "proj_out": "to_out.0"}[part] + f".{leaf}")

    names = list(names)
    plain = not has_transformers(names)
    return tied(names, tie)


def _block(root: str, place: str, tail: str, per_level: int) -> str:
    """Where diffusers keeps a layer: CompVis' stages 1, 2, 3, ... are its blocks of levels, by kind and number."""
    i, j = (int(n) for n in place.split(".")) if "." in place else (0, int(place))
    residual = tail.startswith(RESIDUAL)
    if root == "middle":
        return f"mid_block.{f'resnets.{min(j, 1)}' if residual else 'attentions.0'}."
    level, k = divmod(i - 1 if root == "encoder" else i, per_level)
    side, resampler = ("down", "downsamplers") if root == "encoder" else ("up", "upsamplers")
    if tail in ("weight", "bias"):
        return f"{side}_blocks.{level}.{resampler}.0.conv."
    if residual and (j or (root == "encoder" and k == per_level - 1)):
        return f"{side}_blocks.{level}.{resampler}.0."
    return f"{side}_blocks.{level}.{'resnets' if residual else 'attentions'}.{k}."


def _heads_at(root: str, place: str, settings: Mapping[str, Any]) -> int:
    """How many heads the plain attention there has."""
    if settings.get("head_width") is None:
        return settings["heads"]
    i, per_level, mult = int(place.split(".")[0]), settings["res_blocks"] + 1, settings["mult"]
    level = {"encoder": (i - 1) // per_level, "middle": -1, "decoder": len(mult) - 1 - i // per_level}[root]
    return settings["width"] * mult[level] // settings["head_width"]


def settings_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """CompVis' names (below `model.diffusion_model.`) and shapes -> how `UNet` is built, with `channels` and `widths`.

    How many heads there are does not show in any shape: the published networks' rule is taken.

    Raises:
        Refusal: this is no such U-Net.
    """
    try:
        return _settings_of(shapes)
    except (KeyError, ValueError) as error:
        raise Refusal(f"This is no U-Net in CompVis' layout: {error} is missing among its tensors.") from error


def _settings_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, inward = shapes["input_blocks.0.0.weight"][:2]
    channels, res_blocks = shapes["out.2.weight"][0], _res_blocks(shapes)
    stages = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))
    firsts = range(1, stages, res_blocks + 1)
    keys = [shapes.get(f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight") for i in firsts]
    tokens = next((s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")), 0)
    found = {
        "width": width,
        "mult": [shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0] // width for i in firsts],
        "res_blocks": res_blocks,
        "depth": [_depth(shapes, f"input_blocks.{i}.1") for i in firsts],
        "middle_depth": _depth(shapes, "middle_block.1"),
        "tokens_only": [level for level, k in enumerate(keys) if k and k[0] != k[1]],
        "scale_shift": shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * shapes["input_blocks.1.0.in_layers.2.weight"][0],
        "res_resample": len(firsts) > 1 and not any(name.endswith("op.weight") for name in shapes),
    }
    matrices = any(len(s) == 2 for n, s in shapes.items() if n.endswith("proj_in.weight"))
    found |= _heads(width, tokens, matrices, bool(found["tokens_only"]), found["scale_shift"])
    vector = shapes.get("label_emb.0.0.weight", shapes.get("label_emb.weight", (0, 0)))[1]
    if "label_emb.weight" in shapes:
        found["vector"] = IDENTITY
    return {"channels": channels, "widths": {"vector": vector, "tokens": tokens, "spatial": inward - channels}, **found}


def _res_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Residual blocks of a level: the first level of the decoder has one more, the last of which resizes."""
    ups = [n for n in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.weight", n)]
    if ups:
        return min(int(name.split(".")[1]) for name in ups)
    return max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))


def _heads(width: int, tokens: int, matrices: bool, tokens_only: bool, scale_shift: bool) -> dict[str, Any]:
    """The published rule: LDM's networks have 32-wide heads, but for LSUN churches (8 heads), ImageNet's (one head) and the
    large text model (8 heads); Stable Diffusion 1, as wide as that, and the upscaler have 8 heads, 2 and XL 64-wide heads."""
    if matrices and not tokens_only:
        return {"heads": 8, "head_width": 64}
    if matrices or width == 320 or scale_shift:
        return {"heads": 8, "head_width": None}
    return {"heads": 1, "head_width": None} if (width, tokens) == (192, 512) else {"heads": 8, "head_width": 32}


def _depth(shapes: Mapping[str, tuple[int, ...]], place: str) -> int:
    """How many attention blocks stand there."""
    numbers = [re.match(rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.", name) for name in shapes]
    deepest = max((int(found[1]) + 1 for found in numbers if found), default=0)
    return deepest or int(f"{place}.qkv.weight" in shapes)


def _parts(name: str) -> tuple[str, str, str]:
    """encoder.4.1.blocks.0.q.weight -> encoder, 4.1, blocks.0.q.weight; middle.1.norm.bias -> middle, 1, norm.bias."""
    found = re.fullmatch(r"(encoder|decoder)\.(\d+\.\d+)\.(.+)|(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        raise Refusal(f"{name} is no tensor of a U-Net.")
    return found[1] or found[4], found[2] or found[5], found[3] or found[6]


def has_transformers(names: Iterable[str]) -> bool:
    """Whether a U-Net attends to tokens, or to the picture alone."""
    return any(".blocks." in name for name in names)


def _is_projection(tail: str) -> bool:
    return tail in ("proj_in.weight", "proj_out.weight")
