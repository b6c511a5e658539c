"""Settings as diffusers' config.json files say them, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.interop import unet
from ldm.interop.bundle import BETAS, PREDICTIONS
from ldm.interop.keys import check_keys
from ldm.interop.schedulers import SCHEDULES

VERSION = "0.35.0"
# The upscaler's pipeline adds noise to the small picture by DDPM's table.
LOW_RESOLUTION = {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION, "num_train_timesteps": 1000}
LOW_RESOLUTION |= {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def vae_settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """AutoencoderKL's or VQModel's config -> how `KL` or `VQ` is built, `_target_` with it.

    Raises:
        Refusal: it is neither.
    """
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise Refusal(f"{folder} holds a {kind}; AutoencoderKL and VQModel are known.")
    check_keys(config, kind, str(folder))
    width, *_ = blocks = config["block_out_channels"]
    down, up, channels = config["down_block_types"], config["up_block_types"], config["latent_channels"]
    attends = [block == "AttnDownEncoderBlock2D" for block in down]
    kinds = [[f"{'Attn' if a else ''}{name}" for a in attends] for name in ("DownEncoderBlock2D", "UpDecoderBlock2D")]
    if list(down) != kinds[0] or list(up) != kinds[1][::-1] or any(ch % width for ch in blocks):
        raise Refusal(
            f"{folder} has down_block_types={down}, up_block_types={up} and block_out_channels={blocks}; down blocks, with or "
            "without attention, their mirror, and multiples of the first are known."
        )
    if config.get("vq_embed_dim") not in (None, channels):
        raise Refusal(f"{folder} has vq_embed_dim={config['vq_embed_dim']}; as many as latent_channels, {channels}, are known.")
    ours = {"channels": channels, "width": width, "mult": [ch // width for ch in blocks]}
    ours |= {"res_blocks": config["layers_per_block"], "groups": config.get("norm_num_groups", 32)}
    ours["attention"] = [i for i, attend in enumerate(attends) if attend]
    if kind == "AutoencoderKL":
        return {"_target_": "ldm.autoencoder.kl.KL", **ours}
    return {"_target_": "ldm.autoencoder.vq.VQ", **ours, "codes": config["num_vq_embeddings"]}


def vae_config(ours: Mapping[str, Any], scale: float, quantised: bool) -> dict[str, Any]:
    """How `KL` or `VQ` is built, the defaults filled in -> AutoencoderKL's or VQModel's config."""
    attends = [i in ours["attention"] for i in range(len(ours["mult"]))]
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
        **({"num_vq_embeddings": ours["codes"], "vq_embed_dim": ours["channels"]} if quantised else {}),
    }


def scheduler_config(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Schedule and prediction -> DDIMScheduler's config.

    Raises:
        Refusal: no scheduler of diffusers' Stable Diffusion pipelines has them; names the config lines.
    """
    schedule, level = recipe["schedule"], recipe["level"]
    kinds = {f"ldm.schedule.{ours}": (theirs, *BETAS[ours]) for theirs, ours in SCHEDULES.items()}
    if schedule["_target_"] not in kinds or level["_target_"] != "ldm.denoiser.Timestep":
        raise Refusal(
            f"diffusers' Stable Diffusion pipelines know schedule=scaled_linear or ddpm with level=timestep; this model has "
            f"{schedule['_target_']} with {level['_target_']}. Train with those to export to diffusers."
        )
    words = {f"ldm.prediction.{ours}": theirs for theirs, ours in PREDICTIONS.items()}
    if recipe["prediction"]["_target_"] not in words:
        raise Refusal(f"diffusers knows prediction=noise, velocity or data; found {recipe['prediction']['_target_']}.")
    name, start, end = kinds[schedule["_target_"]]
    zero = schedule.get("zero_terminal_snr", False)  # such models are drawn from the last step on (2305.08891, section 3.3)
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
        "timestep_spacing": "trailing" if zero else "leading",
        "rescale_betas_zero_snr": zero,
    }


def pipeline_of(recipe: Mapping[str, Any], backbone: Mapping[str, Tensor], texts: int, quantised: bool) -> dict[str, Any]:
    """The model_index.json of the pipeline that draws from such a model.

    Raises:
        Refusal: there is none.
    """
    conditions = frozenset(node["_target_"].split(".")[-1] for node in recipe["condition"].values())
    pipelines = {
        frozenset(): "LDMPipeline",
        frozenset({"Bert"}): "LDMTextToImagePipeline",
        frozenset({"Text"}): "StableDiffusionPipeline",
        frozenset({"Text", "Inpaint"}): "StableDiffusionInpaintPipeline",
        frozenset({"Text", "DepthMap"}): "StableDiffusionDepth2ImgPipeline",
        frozenset({"Text", "Upscale"}): "StableDiffusionUpscalePipeline",
        frozenset({"Texts", "Number", "Inpaint"}): "StableDiffusionXLInpaintPipeline",
        frozenset({"Texts", "Number"}): "StableDiffusionXLPipeline" if texts == 2 else "StableDiffusionXLImg2ImgPipeline",
    }
    if conditions not in pipelines:
        known = "none, text, BERT, inpainting, depth, upscaling and XL are known"
        raise Refusal(f"diffusers has no pipeline for the conditions {sorted(conditions)}; {known}.")
    name = pipelines[conditions]
    network = "UNet2DConditionModel" if unet.has_transformers(backbone) else "UNet2DModel"
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": VERSION, "unet": ["diffusers", network]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    stage = {"vqvae": ["diffusers", "VQModel" if quantised else "AutoencoderKL"]}
    if not conditions:
        return index | stage
    if conditions == {"Bert"}:
        text = {"bert": ["latent_diffusion", "LDMBertModel"], "tokenizer": ["transformers", "BertTokenizer"]}
        return index | stage | text
    index["vae"] = ["diffusers", "AutoencoderKL"]
    slots = [""] if "XL" not in name else ["", "_2"][-texts:]
    for slot in slots:
        encoder = "CLIPTextModelWithProjection" if slot else "CLIPTextModel"
        index |= {f"text_encoder{slot}": ["transformers", encoder], f"tokenizer{slot}": ["transformers", "CLIPTokenizer"]}
    if "XL" in name:
        zeros = all(n.get("dropped") == "zeros" for c in recipe["condition"].values() for n in c.get("towers", {}).values())
        return {**index, "force_zeros_for_empty_prompt": zeros, **({} if texts == 2 else {"requires_aesthetics_score": True})}
    if "Depth" in name:
        return {**index, "depth_estimator": [None, None], "feature_extractor": [None, None]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    if "Upscale" in name:
        return {**index, "low_res_scheduler": ["diffusers", "DDPMScheduler"], "watermarker": [None, None], "max_noise_level": 350}
    return {**index, "requires_safety_checker": False}
