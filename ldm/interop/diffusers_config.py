"""Settings as diffusers' config.json files say them, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.interop import unet
from ldm.interop.bundle import PREDICTIONS

VERSION = "0.35.0"


def unet_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], int, dict[str, int]]:
    """UNet2DConditionModel's config -> how `UNet` is built, its channels and widths.

    Raises:
        ValueError: a setting that no network of this family has.
    """
    strange = {k: config.get(k) for k in ("encoder_hid_dim", "time_cond_proj_dim", "class_embed_type", "num_class_embeds")}
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
    channels = config["out_channels"]
    vector = config.get("projection_class_embeddings_input_dim") or 0 if config.get("addition_embed_type") == "text_time" else 0
    widths = {"vector": vector, "tokens": config["cross_attention_dim"], "spatial": config["in_channels"] - channels}
    return settings, channels, widths


def unet_config(settings: Mapping[str, Any], backbone: Mapping[str, Tensor], condition: Mapping[str, Any]) -> dict[str, Any]:
    """How `UNet` is built -> UNet2DConditionModel's config."""
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
    return config


def vae_settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """AutoencoderKL's or VQModel's config -> how `KL` or `VQ` is built, `_target_` with it.

    Raises:
        ValueError: it is neither.
    """
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise ValueError(f"{folder} holds a {kind}; AutoencoderKL and VQModel are known.")
    width, *_ = blocks = config["block_out_channels"]
    ours = {"channels": config["latent_channels"], "width": width, "mult": [ch // width for ch in blocks]}
    ours |= {"res_blocks": config["layers_per_block"], "groups": config.get("norm_num_groups", 32)}
    ours["attention"] = [i for i, block in enumerate(config["down_block_types"]) if block.startswith("Attn")]
    if kind == "AutoencoderKL":
        return {"_target_": "ldm.autoencoder.kl.KL", **ours}
    return {"_target_": "ldm.autoencoder.vq.VQ", **ours, "codes": config["num_vq_embeddings"]}


def vae_config(config: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """How `KL` or `VQ` is built -> AutoencoderKL's or VQModel's config."""
    ours = {"channels": 4, "width": 128, "mult": [1, 2, 4, 4], "res_blocks": 2, "groups": 32, "attention": [], **config}
    attends, quantised = [i in ours["attention"] for i in range(len(ours["mult"]))], config["_target_"].endswith("VQ")
    return {
        "_class_name": "VQModel" if quantised else "AutoencoderKL",
        "_diffusers_version": VERSION,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": ours["channels"],
        "block_out_channels": [ours["width"] * m for m in ours["mult"]],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "layers_per_block": ours["res_blocks"],
        "norm_num_groups": ours["groups"],
        "scaling_factor": scale,
        "act_fn": "silu",
        "sample_size": 256,
        **({"num_vq_embeddings": ours.get("codes", 8192), "vq_embed_dim": ours["channels"]} if quantised else {}),
    }


def scheduler_config(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Schedule and prediction -> DDIMScheduler's config.

    Raises:
        ValueError: no scheduler of diffusers' Stable Diffusion pipelines has them; names the config lines.
    """
    schedule, level = recipe["schedule"], recipe["level"]
    kinds = {"ldm.schedule.ScaledLinear": ("scaled_linear", 0.00085, 0.012), "ldm.schedule.DDPM": ("linear", 1e-4, 0.02)}
    if schedule["_target_"] not in kinds or level["_target_"] != "ldm.denoiser.Timestep":
        raise ValueError(
            f"diffusers' Stable Diffusion pipelines know schedule=scaled_linear or ddpm with level=timestep; this model has "
            f"{schedule['_target_']} with {level['_target_']}. Train with those to export to diffusers."
        )
    words = {f"ldm.prediction.{ours}": theirs for theirs, ours in PREDICTIONS.items()}
    if recipe["prediction"]["_target_"] not in words:
        raise ValueError(f"diffusers knows prediction=noise, velocity or data; found {recipe['prediction']['_target_']}.")
    name, start, end = kinds[schedule["_target_"]]
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule.get("steps", 1000),
        "beta_schedule": name,
        "beta_start": schedule.get("beta_start", start),
        "beta_end": schedule.get("beta_end", end),
        "prediction_type": words[recipe["prediction"]["_target_"]],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
    }


def pipeline_of(recipe: Mapping[str, Any], backbone: Mapping[str, Tensor], texts: int) -> dict[str, Any]:
    """The model_index.json of the pipeline that draws from such a model.

    Raises:
        ValueError: there is none.
    """
    conditions = {node["_target_"].split(".")[-1] for node in recipe["condition"].values()}
    pipelines = {
        frozenset({"Text"}): "StableDiffusionPipeline",
        frozenset({"Text", "Inpaint"}): "StableDiffusionInpaintPipeline",
        frozenset({"Texts", "Number"}): "StableDiffusionXLPipeline" if texts == 2 else "StableDiffusionXLImg2ImgPipeline",
    }
    if frozenset(conditions) not in pipelines:
        raise ValueError(f"diffusers has no pipeline for the conditions {sorted(conditions)}; text, inpainting and XL are known.")
    name = pipelines[frozenset(conditions)]
    index = {"_class_name": name, "_diffusers_version": VERSION}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    slots = [""] if "XL" not in name else ["", "_2"][-texts:]
    for slot in slots:
        encoder = "CLIPTextModelWithProjection" if slot else "CLIPTextModel"
        index |= {f"text_encoder{slot}": ["transformers", encoder], f"tokenizer{slot}": ["transformers", "CLIPTokenizer"]}
    if "XL" in name:
        zeros = all(n.get("dropped") == "zeros" for c in recipe["condition"].values() for n in c.get("towers", {}).values())
        return {**index, "force_zeros_for_empty_prompt": zeros, **({} if texts == 2 else {"requires_aesthetics_score": True})}
    return {**index, "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def _tokens_only(only: bool | Sequence[bool], levels: int) -> list[int]:
    each = [only] * levels if isinstance(only, bool) else only
    return [i for i, alone in enumerate(each) if alone]
