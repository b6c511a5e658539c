"""diffusers' schedulers: the noise schedule that a model was trained on, what it says, and how it is usually drawn from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.interop.bundle import BETAS, PREDICTIONS, SHARE, STRAIGHT, VERSION
from ldm.interop.keys import OFF
from ldm.interop.weights import read_config

SCHEDULES = {"scaled_linear": "ScaledLinear", "linear": "DDPM"}
SPACINGS = ("leading", "linspace", "trailing")
MODEL = "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr".split()
GRID = "timestep_spacing steps_offset use_karras_sigmas".split()
# Settings of drawing, with the values that are used or under which a sampler here draws the same; others are printed.
DRAWING: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False, True),
    "set_alpha_to_one": (False, True),
    "thresholding": (False,),
    "interpolation_type": ("linear",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (float("-inf"),),
    "variance_type": (None, "fixed_small"),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "algorithm_type": ("dpmsolver++", "deis"),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "skip_prk_steps": (True,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "original_inference_steps": (),
    "predictor_order": (),
}
# Numbers of those that are off, or that go with one that is printed.
SILENT = """dynamic_thresholding_ratio clip_sample_range sample_max_value flow_shift time_shift_type timestep_scaling
corrector_order tau_func noise_sampler_seed""".split()
# Another schedule than the betas'.
REFUSED = {"trained_betas": (None, "beta_schedule=trained_betas"), "use_flow_sigmas": (False, "use_flow_sigmas=true")}
EVERY = {*MODEL[:6], "timestep_spacing", "steps_offset"}
SIGMAS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
CLIPPED = {"clip_sample", "clip_sample_range"}
THRESHOLD = {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
FLOW = {"use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type"}
MULTI = EVERY | SIGMAS | THRESHOLD | FLOW | {"solver_order", "solver_type", "lower_order_final"}
MULTI_PP = {"algorithm_type", "final_sigmas_type", "lambda_min_clipped", "variance_type"}
DDIM = EVERY | CLIPPED | THRESHOLD | {"set_alpha_to_one", "rescale_betas_zero_snr"}
DDPM = EVERY | CLIPPED | THRESHOLD | {"variance_type", "rescale_betas_zero_snr"}
FEW = DDIM | {"original_inference_steps", "timestep_scaling"}
LCM, TCD = "LCMScheduler", "TCDScheduler"  # which visit steps of their own; no sampler here draws as the second does
# What each class takes; a key that it does not take is another's, and has no effect on it.
TAKES = {
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    LCM: FEW,
    TCD: FEW,
    "PNDMScheduler": EVERY | {"skip_prk_steps", "set_alpha_to_one"},
    "EulerDiscreteScheduler": EVERY
    | SIGMAS
    | {"interpolation_type", "sigma_min", "sigma_max", "timestep_type", "rescale_betas_zero_snr", "final_sigmas_type"},
    "EulerAncestralDiscreteScheduler": EVERY | {"rescale_betas_zero_snr"},
    "LMSDiscreteScheduler": EVERY | SIGMAS,
    "HeunDiscreteScheduler": EVERY | SIGMAS | CLIPPED,
    "KDPM2DiscreteScheduler": EVERY | SIGMAS,
    "KDPM2AncestralDiscreteScheduler": EVERY | SIGMAS,
    "DPMSolverSDEScheduler": EVERY | SIGMAS | {"noise_sampler_seed"},
    "DPMSolverMultistepScheduler": MULTI | MULTI_PP | {"euler_at_final", "use_lu_lambdas", "rescale_betas_zero_snr"},
    "DPMSolverSinglestepScheduler": (MULTI | MULTI_PP) - {"timestep_spacing", "steps_offset"},
    "DEISMultistepScheduler": MULTI | {"algorithm_type"},
    "UniPCMultistepScheduler": MULTI
    | {"predict_x0", "disable_corrector", "solver_p", "final_sigmas_type", "rescale_betas_zero_snr"}
    | {"sigma_min", "sigma_max", "shift_terminal"},
    "SASolverScheduler": EVERY
    | SIGMAS
    | THRESHOLD
    | {"use_flow_sigmas", "flow_shift", "algorithm_type", "lower_order_final", "lambda_min_clipped", "variance_type"}
    | {"predictor_order", "corrector_order", "tau_func"},
}
FLOWS = "FlowMatchEulerDiscreteScheduler"
# Its keys that are used, and those that have the values under which a sampler here draws the same.
FLOW_USED = {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15}
FLOW_USED |= {"base_image_seq_len": 256, "max_image_seq_len": 4096, "num_train_timesteps": 1000}
FLOW_ONLY: dict[str, tuple[Any, ...]] = {f"use_{kind}_sigmas": (False, None) for kind in ("karras", "exponential", "beta")}
FLOW_ONLY |= {"invert_sigmas": (False,), "shift_terminal": (None,), "time_shift_type": ("exponential",)}
FLOW_ONLY |= {"stochastic_sampling": (False,)}
# What a class means by keys that are not said, where that is not what most mean, which is `USUAL`.
EARLY, LEADING = {"beta_start": 0.00085, "beta_end": 0.012}, {"timestep_spacing": "leading"}
USUAL = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "linspace", "steps_offset": 0}
USUAL |= {"prediction_type": "epsilon", "num_train_timesteps": 1000, "rescale_betas_zero_snr": False, "use_karras_sigmas": False}
USUAL |= {"set_alpha_to_one": True, "clip_sample": False, "skip_prk_steps": True}
DISTILLED = {"original_inference_steps": 50, "timestep_scaling": 10.0}
MEANS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {**LEADING, "set_alpha_to_one": False, "skip_prk_steps": False},
    **dict.fromkeys(("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), EARLY),
    "DPMSolverSDEScheduler": EARLY,
    **{name: {**EARLY, **LEADING, "beta_schedule": "scaled_linear", **DISTILLED} for name in (LCM, TCD)},
    **{f"{name}Scheduler": {**LEADING, "clip_sample": True} for name in ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel")},
}
MULTISTEP = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")  # which spare one step
MULTISTEP += ("DEISMultistepScheduler", "SASolverScheduler")
# Karras' sigmas lie between those of the steps that their spacing visits, and not between the table's ends.
WITHIN = ("EulerDiscrete", "LMSDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
# Pipelines that change what is said: `steps_offset` is 1 in all three, and the first two do not clip.
CLIPS_NOT = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
FROM_ONE = (*CLIPS_NOT, "StableDiffusionInpaintPipeline")


def read_schedule(folder: Path, kind: str | None = None, pipeline: str = "") -> tuple[dict[str, Any], str, str | None, list[str]]:
    """A scheduler's folder -> the config of the noise schedule, what the network says, how steps are spaced, and remarks.

    Args:
        kind: the class that model_index.json names, which counts; by default the one that the folder names.
        pipeline: the class that draws with it.

    Raises:
        Refusal: a schedule that this family does not have.
    """
    told = read_config(folder / "scheduler_config.json")
    kind = kind or told.get("_class_name", "scheduler without a class")
    if kind == FLOWS:
        return dict(STRAIGHT), "Flow", _flow_grid(told, folder), []
    if kind not in list(TAKES):
        raise Refusal(f"{folder} has a {kind}; of diffusers' schedulers {', '.join(TAKES)} and {FLOWS} are known.")
    said = {name: value for name, value in told.items() if name in TAKES[kind]}
    wrong = [text for name, (only, text) in REFUSED.items() if said.get(name, only) != only]
    wrong += [f"{n}={v}" for n, v in told.items() if n[0] != "_" and n not in _known() and v not in OFF]
    if wrong:
        raise Refusal(f"{folder} has a {kind} with {', '.join(wrong)}, which no model of this family has.")
    means = {**USUAL, **MEANS.get(kind, {}), **said}
    schedule, prediction = _schedule(means, kind, folder)
    grid, remarks = _grid(means, kind, pipeline, folder)
    if (own := told.get("_class_name", kind)) != kind:
        remarks.append(f"steps: {kind}, as model_index.json says; the scheduler's own config says {own}")
    if "timestep_spacing" not in said and grid is not None and kind != LCM:
        remarks.insert(0, f"steps: {kind} means {means['timestep_spacing']} where timestep_spacing is not said")
    return schedule, prediction, grid, remarks + _drawing(means, kind, pipeline)


def _schedule(means: Mapping[str, Any], kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    name, prediction = means["beta_schedule"], means["prediction_type"]
    if name not in list(SCHEDULES):
        raise Refusal(f"{folder} has a {kind} with beta_schedule={name}; {', '.join(SCHEDULES)} are known.")
    if prediction not in list(PREDICTIONS):
        raise Refusal(f"{folder} has prediction_type={prediction}; {', '.join(PREDICTIONS)} are known.")
    betas = {end: means[end] for end in ("beta_start", "beta_end")}
    if not all(type(beta) in (int, float) and 0 < beta < 1 for beta in betas.values()):
        raise Refusal(f"{folder} has betas from {means['beta_start']} to {means['beta_end']}; numbers in (0, 1) were wanted.")
    if means["num_train_timesteps"] != 1000:
        raise Refusal(
            f"{folder} has num_train_timesteps={means['num_train_timesteps']}; networks of this family are told of 1000."
        )
    if type(zero := means["rescale_betas_zero_snr"]) is not bool:
        raise Refusal(f"{folder} has rescale_betas_zero_snr={zero}; true or false was wanted.")
    schedule = {"_target_": f"ldm.schedule.{SCHEDULES[name]}", **betas, **({"zero_terminal_snr": True} if zero else {})}
    return schedule, PREDICTIONS[prediction]


def _grid(means: Mapping[str, Any], kind: str, pipeline: str, folder: Path) -> tuple[str | None, list[str]]:
    """The words that choose these steps here, and where they differ."""
    spacing, offset = means["timestep_spacing"], means["steps_offset"]
    if spacing not in SPACINGS or type(offset) is not int or not 0 <= offset < 1000:
        raise Refusal(
            f"{folder} has timestep_spacing={spacing}, steps_offset={offset}; {', '.join(SPACINGS)} and a whole number are known."
        )
    if kind == LCM:
        return _distilled(means, folder), []
    if kind == TCD:
        return None, [f"steps: a {kind} draws in few steps of its own, as none here does; the model is the same"]
    remarks = []
    if pipeline in FROM_ONE and offset != 1 and spacing == "leading":
        remarks.append(f"steps: steps_offset={offset} is said, and {pipeline} takes 1")
        offset = 1
    if means["use_karras_sigmas"]:
        if kind.removesuffix("Scheduler") in WITHIN and spacing != "linspace":
            first = (29 * 33 + offset + 1) / 1000 if spacing == "leading" else 1.0
            lowest = (offset + 1) / 1000 if spacing == "leading" else 0.033
            remarks.append(
                f"steps: {kind} lays Karras' sigmas between those of {spacing}'s first and last step: at 30 steps "
                f"sampler.grid.first={first:g} sampler.grid.lowest={lowest:g}"
            )
        return "karras", remarks
    words = [spacing]
    words += [f"sampler.grid.offset={offset}"] if spacing == "leading" and offset != 1 else []
    words += ["sampler.grid.spare=1"] if kind in MULTISTEP and spacing != "trailing" else []
    return " ".join(words), remarks


def _distilled(means: Mapping[str, Any], folder: Path) -> str:
    """The steps of a latent consistency model's scheduler, which heeds neither spacing nor offset.

    Raises:
        Refusal: it was distilled over no number of the table's steps, or scales them by none.
    """
    original, scaling = (means[name] for name in DISTILLED)
    if type(original) is not int or not 1 <= original <= 1000 or type(scaling) not in (int, float) or not scaling > 0:
        raise Refusal(
            f"{folder} has original_inference_steps={original}, timestep_scaling={scaling}; a whole number from 1 to 1000 and "
            "a number above 0 were wanted."
        )
    return "distilled" if original == 50 else f"distilled sampler.grid.original={original}"


def stops(told: Mapping[str, Any], kind: str) -> bool:
    """Whether the last step of a scheduler, told so, ends at the first step of the table and not at the data."""
    return (
        kind != LCM
        and "set_alpha_to_one" in TAKES.get(kind, ())
        and not {**USUAL, **MEANS.get(kind, {}), **told}["set_alpha_to_one"]
    )


def _drawing(means: Mapping[str, Any], kind: str, pipeline: str) -> list[str]:
    """What of its own way of drawing is not taken over."""
    remarks = []
    if stops(means, kind):
        remarks.append("steps: the last ends at the first step of the table, not at the data: sampler.grid.last=0.001")
    if "clip_sample" in TAKES[kind] and means["clip_sample"] and pipeline not in CLIPS_NOT:
        by = f"by {pipeline}" if pipeline else "there"
        remarks.append(f"{kind}: clip_sample=True: latents are clipped to [-1, 1] {by}, and not here")
    used = DISTILLED if kind == LCM else ()
    other = [
        f"{n}={means[n]}"
        for n, same in DRAWING.items()
        if n in TAKES[kind] and n not in used and n in means and means[n] not in same
    ]
    return remarks + ([f"{kind}: {', '.join(other)} is its own way of drawing, which is not the model's"] if other else [])


def _flow_grid(told: Mapping[str, Any], folder: Path) -> str:
    """How the steps of straight paths are spaced: by a shift, or by one that grows with the picture.

    Raises:
        Refusal: otherwise.
    """
    said = {**FLOW_USED, **{n: v for n, v in told.items() if n[0] != "_"}}
    wrong = [f"{n}={v}" for n, v in said.items() if n not in FLOW_USED and v not in FLOW_ONLY.get(n, OFF)]
    if wrong or said["num_train_timesteps"] != 1000:
        wrong = wrong or [f"num_train_timesteps={said['num_train_timesteps']}"]
        raise Refusal(f"{folder} has a {FLOWS} with {', '.join(wrong)}, which no model of this family has.")
    if not said["use_dynamic_shifting"]:
        return "uniform" if said["shift"] == 1 else f"shifted sampler.grid.shift={said['shift']}"
    names = {"base_shift": "low", "max_shift": "high", "base_image_seq_len": "few", "max_image_seq_len": "many"}
    other = [f"sampler.grid.{ours}={said[name]}" for name, ours in names.items() if said[name] != FLOW_USED[name]]
    return " ".join(["by_size", *other])


def flow_config(recipe: Mapping[str, Any], **told: Any) -> dict[str, Any]:
    """FlowMatchEulerDiscreteScheduler's config, `told` besides.

    Raises:
        Refusal: the model is not one of straight paths that says flow.
    """
    parts = [recipe[name]["_target_"] for name in ("schedule", "prediction", "level")]
    if parts != [STRAIGHT["_target_"], "ldm.prediction.Flow", SHARE["_target_"]] or recipe["schedule"].get("shift", 1.0) != 1.0:
        raise Refusal(
            f"diffusers' pipelines of this network know schedule=linear without a shift, prediction=flow and level=noise_time; "
            f"this model has {', '.join(parts)}. Train with those to export to diffusers."
        )
    return {"_class_name": FLOWS, "_diffusers_version": VERSION, "num_train_timesteps": 1000, "shift": 1.0, **told}


def _known() -> set[str]:
    return {*MODEL, *GRID, *DRAWING, *SILENT, *REFUSED}


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
