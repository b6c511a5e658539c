"""How a published model is drawn from unless it is said: its pipeline's own pixels, sampler, steps, grid and guidance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.files.folder import read_json
from ldm.interop.bundle import BACKBONE, Bundle
from ldm.interop.conditions import EDIT
from ldm.interop.schedulers import LCM, MEANS, MULTISTEP, stops
from ldm.interop.weights import class_of

CFG, GRID, SAMPLER = "ldm.guidance.cfg.CFG", "ldm.sampler.grid.", "ldm.sampler."
SCALES, PICTURE = "ldm.guidance.scales.Scales", 1.5  # of InstructPix2Pix, which also has a scale for the picture
# What diffusers' pipelines take unless they are told: steps, and the scale of guidance.
PIPELINES: dict[str, tuple[int, float]] = {
    "DiTPipeline": (50, 4.0),
    "PixArtAlphaPipeline": (20, 4.5),
    "PixArtSigmaPipeline": (20, 4.5),
    "StableDiffusion3Pipeline": (28, 7.0),
    "LDMTextToImagePipeline": (50, 1.0),
    "StableDiffusionInstructPix2PixPipeline": (100, 7.5),
    "StableDiffusionUpscalePipeline": (75, 9.0),
    "StableDiffusionXLInstructPix2PixPipeline": (100, 5.0),
    "StableDiffusionXLPipeline": (50, 5.0),
    "StableDiffusionXLImg2ImgPipeline": (50, 5.0),
}
USUAL = (50, 7.5)  # of the others, which are Stable Diffusion's
FEW = (4, 1.0)  # of latent consistency models, whose pipelines' 50 steps and guidance their authors advise against
SAMPLERS = {
    "DDPMScheduler": "ddpm.DDPM",
    "FlowMatchEulerDiscreteScheduler": "euler.Euler",
    "EulerDiscreteScheduler": "euler.Euler",
    "LMSDiscreteScheduler": "euler.Euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral.EulerAncestral",
    "KDPM2AncestralDiscreteScheduler": "euler_ancestral.EulerAncestral",
    "HeunDiscreteScheduler": "heun.Heun",
    "KDPM2DiscreteScheduler": "heun.Heun",
    "DPMSolverMultistepScheduler": "dpmpp.DPMpp",
    "DPMSolverSinglestepScheduler": "dpmpp.DPMpp",
    "DEISMultistepScheduler": "dpmpp.DPMpp",
    "UniPCMultistepScheduler": "unipc.UniPC",
    LCM: "consistency.Consistency",
}
DDIM = "ddim.DDIM"  # of the others: of PNDM too, whose model is the same and whose steps have no sampler here
FLUX_SIDE = 128  # latents a side, of which its configs say nothing
HALVES = {torch.float16: "16", torch.bfloat16: "bf16"}


def usual_of(bundle: Bundle, path: Path) -> dict[str, Any]:
    """A model read from `path`, a folder of diffusers' or a single file -> `usual` of its config.json, as far as it is known."""
    if bundle.recipe is None:
        return {}
    usual: dict[str, Any] = {}
    kinds = {x.dtype for n, x in bundle.weights.items() if n.startswith(BACKBONE) and x.is_floating_point()}
    if len(kinds) == 1 and (kind := HALVES.get(kinds.pop())) is not None:
        usual["precision"] = kind
    folder = _folder_usual(bundle, path) if (path / "model_index.json").is_file() else _file_usual(bundle)
    return {**usual, **folder}


def _folder_usual(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """By its pipeline, its scheduler, and the size of its network's latents."""
    index = read_json(folder / "model_index.json")
    steps, scale = PIPELINES.get(str(index.get("_class_name")), USUAL)
    steps = _flux_steps(bundle) if _is(bundle, "flux.Flux") else steps
    told = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = class_of(index, "scheduler") or str(told.get("_class_name"))
    steps, scale = FEW if kind == LCM else (steps, scale)
    usual = {"sampler": _sampler(bundle, steps, told, kind)}
    usual |= {"guidance": _guidance(bundle, scale)}
    network = next((folder / name / "config.json" for name in ("unet", "transformer") if (folder / name).is_dir()), None)
    latents = read_json(network).get("sample_size") if network is not None else None
    latents = FLUX_SIDE if _is(bundle, "flux.Flux") else latents
    if latents is not None and "autoencoder" in bundle.parts:
        sides = latents if isinstance(latents, list) else [latents] * 2
        usual["resolution"] = [side * _factor(bundle) for side in sides]
    return usual


def _sampler(bundle: Bundle, steps: int, told: Mapping[str, Any], kind: str) -> dict[str, Any]:
    word, *settings = (bundle.grid or "leading").split()
    grid: dict[str, Any] = {"_target_": GRID + "".join(map(str.capitalize, word.split("_")))}
    said = (setting.removeprefix("sampler.grid.").split("=") for setting in settings if setting.startswith("sampler.grid."))
    grid |= {name: yaml.safe_load(value) for name, value in said}
    if stops(told, kind) and word in ("leading", "trailing", "linspace"):
        grid["last"] = 0.001
    sde = kind in MULTISTEP and told.get("algorithm_type") == "sde-dpmsolver++"
    name = "dpmpp_sde.DPMppSDE" if sde else SAMPLERS.get(kind, DDIM)
    scaling = {"scaling": {**MEANS[LCM], **told}["timestep_scaling"]} if kind == LCM else {}
    return {"_target_": SAMPLER + name, "steps": steps, **scaling, "grid": grid}


def _file_usual(bundle: Bundle) -> dict[str, Any]:
    """By its family: what a single file is drawn at, its own code's settings."""
    recipe = bundle.recipe
    condition = {node["_target_"].rpartition(".")[2]: node for node in recipe["condition"].values()}
    if _is(bundle, "mmdit.MMDiT"):
        sampler = {"_target_": SAMPLER + "euler.Euler", "steps": 28, "grid": {"_target_": GRID + "Shifted"}}
        return {"sampler": sampler, "guidance": _guidance(bundle, 7.0), "resolution": [1024, 1024]}
    if _is(bundle, "flux.Flux"):
        grid = {"_target_": GRID + ("BySize" if recipe["backbone"].get("guided") else "Uniform")}
        sampler = {"_target_": SAMPLER + "euler.Euler", "steps": _flux_steps(bundle), "grid": grid}
        return {"sampler": sampler, "guidance": _guidance(bundle, 1.0), "resolution": [8 * FLUX_SIDE] * 2}
    if recipe["schedule"]["_target_"].rpartition(".")[2] not in ("ScaledLinear", "DDPM"):
        return {}  # of straight paths: as ours are
    large = "Number" in condition
    zero = recipe["schedule"].get("zero_terminal_snr", False)
    grid = {"_target_": GRID + ("Trailing" if zero else "Leading")}
    sampler = {"_target_": SAMPLER + ("euler.Euler" if large else DDIM), "steps": 50, "grid": grid}
    if recipe["backbone"]["_target_"].endswith("dit.DiT"):
        side = recipe["backbone"].get("size", 32) * 8
        return {"sampler": sampler, "guidance": _guidance(bundle, 4.0), "resolution": [side] * 2}
    if not {"Text", "Texts"} & condition.keys() or "Upscale" in condition:
        return {"sampler": sampler}
    velocity = recipe["prediction"]["_target_"].endswith("Velocity")
    side = 1024 if large else 768 if velocity else 512
    return {"sampler": sampler, "guidance": _guidance(bundle, 5.0 if large else 7.5), "resolution": [side] * 2}


def _is(bundle: Bundle, network: str) -> bool:
    return bundle.recipe["backbone"]["_target_"] == f"ldm.backbone.{network}"


def _flux_steps(bundle: Bundle) -> int:
    """Of dev, which is told a guidance scale, the pipeline's; of schnell those that its page names."""
    return 28 if bundle.recipe["backbone"].get("guided") else 4


def _guidance(bundle: Bundle, scale: float) -> dict[str, Any]:
    """None where there is nothing to leave out, or a network that needs none (Flux)."""
    if (edit := bundle.made_by(EDIT)) is not None:
        text = next(name for name in bundle.recipe["condition"] if name != edit)
        return {"_target_": SCALES, "scales": {edit: PICTURE, text: scale}}
    guided = bundle.recipe["condition"] and not _is(bundle, "flux.Flux")
    return {"_target_": CFG, "scale": scale, "rescale": 0.0} if guided else {"_target_": "ldm.guidance.none.Unguided"}


def _factor(bundle: Bundle) -> int:
    return 2 ** (len(bundle.parts["autoencoder"].settings()["mult"]) - 1)
