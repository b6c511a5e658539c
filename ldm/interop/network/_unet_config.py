"""The U-Nets' settings as diffusers' UNet2DConditionModel and, without tokens, UNet2DModel say them, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.interop.bundle import VERSION
from ldm.interop.conditions import IDENTITY
from ldm.interop.keys import check_keys
from ldm.interop.network._unet_names import linear

KINDS = ("conv", "resnet")  # how UNet2DModel resizes
ALWAYS = {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "act_fn": "silu", "sample_size": 64}  # of what is written


def unet_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], int, dict[str, int]]:
    """UNet2DConditionModel's or UNet2DModel's config -> how `UNet` is built, its channels and widths.

    Raises:
        Refusal: a setting that no network of this family has.
    """
    kind = config.get("_class_name")
    if kind not in ("UNet2DModel", "UNet2DConditionModel"):
        raise Refusal(f"The unet is a {kind}; UNet2DConditionModel and UNet2DModel are known.")
    config = check_keys(config, kind, "The unet")
    if kind == "UNet2DModel":
        return _plain_settings(config)
    width, mult, attends = _levels(config, "CrossAttn")
    levels = len(mult)
    per_level = _each(config, "transformer_layers_per_block", levels)
    settings = {
        "width": width,
        "mult": mult,
        "res_blocks": _one(config, "layers_per_block", levels),
        "depth": [depth if cross else 0 for depth, cross in zip(per_level, attends)],
        "middle_depth": per_level[-1],
        **_heads(config, [width * m for m in mult], attends),
        "groups": config["norm_num_groups"],
        "tokens_only": [i for i, alone in enumerate(_each(config, "only_cross_attention", levels)) if alone],
    }
    channels, vector = config["out_channels"], 0
    if config["addition_embed_type"] == "text_time":
        if None in (vector := config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]):
            raise Refusal(
                "The unet has addition_embed_type=text_time, and projection_class_embeddings_input_dim="
                f"{vector}, addition_time_embed_dim={config['addition_time_embed_dim']}; whole numbers were wanted."
            )
    if config["num_class_embeds"] is not None:
        if vector or config["in_channels"] != channels + 3:
            raise Refusal(
                f"The unet has num_class_embeds={config['num_class_embeds']}, which only the x4 upscaler's has, with 3 channels "
                "more than the latents have."
            )
        vector, settings["vector"] = 4 * width, IDENTITY
    tokens = _one(config, "cross_attention_dim", levels)
    widths = {"vector": vector, "tokens": tokens, "spatial": config["in_channels"] - channels}
    return settings, channels, widths


def unet_config(settings: Mapping[str, Any], backbone: Mapping[str, Tensor], condition: Mapping[str, Any]) -> dict[str, Any]:
    """How `UNet` is built -> UNet2DConditionModel's config, or UNet2DModel's where there are no tokens."""
    if not any(".blocks." in name for name in backbone):
        return _plain_config(settings, backbone)
    blocks = [settings["width"] * m for m in settings["mult"]]
    attends = [depth > 0 for depth in settings["depth"]]
    tokens = next(x.shape[1] for name, x in backbone.items() if name.endswith("attend_tokens.k.weight"))
    width = settings["head_width"]
    down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in attends]
    up = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(attends)]
    depths = [depth or 1 for depth in settings["depth"]]
    depths[-1] = settings["middle_depth"] if not settings["depth"][-1] else depths[-1]
    config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "in_channels": backbone["encoder.0.0.weight"].shape[1],
        "out_channels": backbone["out.2.weight"].shape[0],
        "block_out_channels": blocks,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": settings["res_blocks"],
        "transformer_layers_per_block": depths if max(depths) > 1 else 1,
        "attention_head_dim": settings["heads"] if width is None else [ch // width for ch in blocks],
        "cross_attention_dim": tokens,
        "norm_num_groups": settings["groups"],
        "use_linear_projection": linear(settings),
        "only_cross_attention": [i in settings["tokens_only"] for i in range(len(blocks))] if settings["tokens_only"] else False,
        **ALWAYS,
    }
    if "vector.0.weight" in backbone:
        vector = backbone["vector.0.weight"].shape[1]
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": vector}
        config |= {"addition_time_embed_dim": _of(condition, "Number").get("width", 256), "sample_size": 128}
    if upscale := _of(condition, "Upscale"):
        config |= {"num_class_embeds": upscale.get("steps", 1000), "sample_size": 128}
    return config


def _of(condition: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The config of the condition of a class, whatever it is called; empty where there is none."""
    return next((node for node in condition.values() if node.get("_target_", "").split(".")[-1] == kind), {})


def _plain_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], int, dict[str, int]]:
    width, mult, attends = _levels(config, "Attn")
    heads, groups = config["attention_head_dim"], config["norm_num_groups"]
    shift, resize = config["resnet_time_scale_shift"], config["downsample_type"]
    wrong = {"attn_norm_num_groups": config["attn_norm_num_groups"] not in (None, groups)}
    wrong |= {"resnet_time_scale_shift": shift not in ("default", "scale_shift"), "downsample_type": resize not in KINDS}
    wrong |= {"upsample_type": config["upsample_type"] != resize}
    if any(wrong.values()):
        name = next(name for name in wrong if wrong[name])
        raise Refusal(f"The unet has {name}={config[name]}, which does not go with the others of this family.")
    settings = {
        "width": width,
        "mult": mult,
        "res_blocks": _one(config, "layers_per_block", len(mult)),
        "depth": [int(attend) for attend in attends],
        "middle_depth": int(config["add_attention"]),
        **({"heads": 1, "head_width": None} if heads is None else {"heads": 8, "head_width": heads}),
        "groups": groups,
        "scale_shift": shift == "scale_shift",
        "res_resample": resize == "resnet",
    }
    channels = config["out_channels"]
    return settings, channels, {"vector": 0, "tokens": 0, "spatial": config["in_channels"] - channels}


def _plain_config(settings: Mapping[str, Any], backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks, attends = [settings["width"] * m for m in settings["mult"]], [depth > 0 for depth in settings["depth"]]
    heads, width = settings["heads"], settings["head_width"]
    if width is None and heads != 1:
        raise Refusal(
            "diffusers' UNet2DModel knows heads of one width (backbone.head_width), or a single head (backbone.heads=1)."
        )
    resize = "resnet" if settings["res_resample"] else "conv"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "in_channels": backbone["encoder.0.0.weight"].shape[1],
        "out_channels": backbone["out.2.weight"].shape[0],
        "block_out_channels": blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": settings["res_blocks"],
        "attention_head_dim": width,
        "add_attention": settings["middle_depth"] > 0,
        "norm_num_groups": settings["groups"],
        "attn_norm_num_groups": settings["groups"],
        "resnet_time_scale_shift": "scale_shift" if settings["scale_shift"] else "default",
        "downsample_type": resize,
        "upsample_type": resize,
        "downsample_padding": 1,
        **ALWAYS,
    }


def _levels(config: Mapping[str, Any], attending: str) -> tuple[int, list[int], list[bool]]:
    """The width, its multiples by level, and which levels attend.

    Raises:
        Refusal: blocks of another kind, or widths that are no multiples.
    """
    width, *_ = blocks = config["block_out_channels"]
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    attends = [kind == f"{attending}DownBlock2D" for kind in down]
    mirrored = [f"{attending}UpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    if down != [f"{attending}DownBlock2D" if a else "DownBlock2D" for a in attends] or up != mirrored:
        raise Refusal(
            f"The unet has down_block_types={down} and up_block_types={up}; {attending}DownBlock2D, DownBlock2D and their mirror "
            "are known."
        )
    if any(ch % width for ch in blocks) or len(blocks) != len(down):
        raise Refusal(f"The unet has block_out_channels={blocks} for {len(down)} levels; multiples of the first are known.")
    return width, [ch // width for ch in blocks], attends


def _heads(config: Mapping[str, Any], blocks: Sequence[int], attends: Sequence[bool]) -> dict[str, Any]:
    """How many heads there are, or how wide: `attention_head_dim` is their number, whatever it is called."""
    name = "num_attention_heads" if config["num_attention_heads"] else "attention_head_dim"
    each = _each(config, name, len(blocks))
    heard = {(n, ch // n) for n, ch, a in zip(each, blocks, [*attends[:-1], True]) if a}  # the middle has the last level's
    counts, widths = {n for n, _ in heard}, {width for _, width in heard}
    if len(counts) > 1 and len(widths) > 1:
        raise Refusal(
            f"The unet has {name}={each} on {list(blocks)} channels; one number of heads, or heads of one width, are known."
        )
    if isinstance(config[name], int) or len(widths) > 1:
        return {"heads": counts.pop(), "head_width": None}
    return {"heads": 8, "head_width": widths.pop()}


def _each(config: Mapping[str, Any], name: str, levels: int) -> list[Any]:
    """A setting by level, which is told once or for each.

    Raises:
        Refusal: for another number of levels, or by block of a level.
    """
    value = config[name]
    each = [value] * levels if isinstance(value, int) else list(value)
    if len(each) != levels:
        raise Refusal(f"The unet has {name}={value}; a value for each of its {levels} levels was wanted, or one for all.")
    return each


def _one(config: Mapping[str, Any], name: str, levels: int) -> int:
    """A setting that is the same at all levels, or refused by name."""
    if len(set(each := _each(config, name, levels))) > 1:
        raise Refusal(f"The unet has {name}={each}; the same at all levels is known.")
    return each[0]
