"""The U-Nets' settings as diffusers' UNet2DConditionModel and, without tokens, UNet2DModel say them, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.interop import unet
from ldm.interop.conditions import IDENTITY

VERSION = "0.35.0"


def unet_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], int, dict[str, int]]:
    """UNet2DConditionModel's or UNet2DModel's config -> how `UNet` is built, its channels and widths.

    Raises:
        ValueError: a setting that no network of this family has.
    """
    if config.get("_class_name") == "UNet2DModel":
        return _plain_settings(config)
    strange = {k: config.get(k) for k in ("encoder_hid_dim", "time_cond_proj_dim", "class_embed_type")}
    strange = {k: v for k, v in strange.items() if v is not None}
    if config.get("_class_name") != "UNet2DConditionModel" or strange or config.get("dual_cross_attention"):
        raise ValueError(f"The unet is a {config.get('_class_name')} with {strange}; no whole model of this family has that.")
    width, *_ = blocks = config["block_out_channels"]
    levels = len(blocks)
    per_level = config.get("transformer_layers_per_block", 1)
    per_level = [per_level] * levels if isinstance(per_level, int) else per_level
    attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    count = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # heads, whatever it is called
    heads = {"heads": count, "head_width": None} if isinstance(count, int) else {"heads": 8, "head_width": blocks[0] // count[0]}
    settings = {
        "width": width,
        "mult": [ch // width for ch in blocks],
        "res_blocks": config["layers_per_block"],
        "depth": [depth if cross else 0 for depth, cross in zip(per_level, attends)],
        "middle_depth": per_level[-1] if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") else 0,
        **heads,
        "groups": config.get("norm_num_groups", 32),
        "tokens_only": _tokens_only(config.get("only_cross_attention", False), levels),
    }
    channels, vector = config["out_channels"], 0
    if config.get("addition_embed_type") == "text_time":
        vector = config["projection_class_embeddings_input_dim"]
    if config.get("num_class_embeds") is not None:
        vector, settings["vector"] = 4 * width, IDENTITY
    widths = {"vector": vector, "tokens": config["cross_attention_dim"], "spatial": config["in_channels"] - channels}
    return settings, channels, widths


def unet_config(settings: Mapping[str, Any], backbone: Mapping[str, Tensor], condition: Mapping[str, Any]) -> dict[str, Any]:
    """How `UNet` is built -> UNet2DConditionModel's config, or UNet2DModel's where there are no tokens."""
    if not unet.has_transformers(backbone):
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
        "use_linear_projection": unet.linear(settings),
        "only_cross_attention": [i in settings["tokens_only"] for i in range(len(blocks))] if settings["tokens_only"] else False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "sample_size": 64,
    }
    if "vector.0.weight" in backbone:
        vector = backbone["vector.0.weight"].shape[1]
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": vector}
        config |= {"addition_time_embed_dim": condition["number"].get("width", 256), "sample_size": 128}
    if "upscale" in condition:
        config |= {"num_class_embeds": condition["upscale"].get("steps", 1000), "sample_size": 128}
    return config


def _plain_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], int, dict[str, int]]:
    waves = (config.get("time_embedding_type", "positional"), config.get("freq_shift", 0), config.get("flip_sin_to_cos", True))
    if waves != ("positional", 0, True) or config.get("class_embed_type") or config.get("num_class_embeds"):
        raise ValueError(f"The unet tells time by {waves}, or a class; the unconditional models of this family do neither.")
    width, *_ = blocks = config["block_out_channels"]
    depth = [int(kind.startswith("Attn")) for kind in config["down_block_types"]]
    heads = config.get("attention_head_dim", 8)
    settings = {
        "width": width,
        "mult": [ch // width for ch in blocks],
        "res_blocks": config["layers_per_block"],
        "depth": depth,
        "middle_depth": int(config.get("add_attention", True)),
        **({"heads": 1, "head_width": None} if heads is None else {"heads": 8, "head_width": heads}),
        "groups": config.get("norm_num_groups", 32),
        "scale_shift": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "res_resample": config.get("downsample_type", "conv") == "resnet",
    }
    channels = config["out_channels"]
    return settings, channels, {"vector": 0, "tokens": 0, "spatial": config["in_channels"] - channels}


def _plain_config(settings: Mapping[str, Any], backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks, attends = [settings["width"] * m for m in settings["mult"]], [depth > 0 for depth in settings["depth"]]
    heads, width = settings["heads"], settings["head_width"]
    if width is None and heads != 1:
        raise ValueError(
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
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "sample_size": 64,
    }


def _tokens_only(only: bool | Sequence[bool], levels: int) -> list[int]:
    each = [only] * levels if isinstance(only, bool) else only
    return [i for i, alone in enumerate(each) if alone]
