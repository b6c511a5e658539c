"""The pipelines of diffusers that draw from models on a U-Net."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.interop.bundle import VERSION

XL_EDITS = "StableDiffusionXLInstructPix2PixPipeline"


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
        frozenset({"Text", "Edit"}): "StableDiffusionInstructPix2PixPipeline",
        frozenset({"Text", "DepthMap"}): "StableDiffusionDepth2ImgPipeline",
        frozenset({"Text", "Upscale"}): "StableDiffusionUpscalePipeline",
        frozenset({"Texts", "Number", "Inpaint"}): "StableDiffusionXLInpaintPipeline",
        frozenset({"Texts", "Number", "Edit"}): XL_EDITS,
        frozenset({"Texts", "Number"}): "StableDiffusionXLPipeline" if texts == 2 else "StableDiffusionXLImg2ImgPipeline",
    }
    if conditions not in pipelines:
        known = "none, text, BERT, inpainting, edits, depth, upscaling and XL are known"
        raise Refusal(f"diffusers has no pipeline for the conditions {sorted(conditions)}; {known}.")
    name = pipelines[conditions]
    network = "UNet2DConditionModel" if any(".blocks." in name for name in backbone) else "UNet2DModel"
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
