"""diffusers' schedulers: the noise schedule that a model was trained on, what it says, and how it is usually drawn from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.interop.bundle import BETAS, PREDICTIONS, SHARE, STRAIGHT, VERSION
from ldm.interop.keys import OFF
from ldm.interop.weights import read_config

SCHEDULES = {"scaled_linear": "ScaledLinear", "linear": "DDPM"}
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
}
# Numbers of those that are off.
SILENT = "dynamic_thresholding_ratio clip_sample_range sample_max_value flow_shift time_shift_type".split()
# Another schedule than the betas'.
REFUSED = {"trained_betas": (None, "beta_schedule=trained_betas"), "use_flow_sigmas": (False, "use_flow_sigmas=true")}
EVERY = {*MODEL[:6], "timestep_spacing", "steps_offset"}
SIGMAS = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
CLIPPED = {"clip_sample", "clip_sample_range"}
THRESHOLD = {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
FLOW = {"use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type"}
MULTI = EVERY | SIGMAS | THRESHOLD | FLOW | {"solver_order", "solver_type", "lower_order_final"}
MULTI_PP = {"algorithm_type", "final_sigmas_type", "lambda_min_clipped", "variance_type"}
# What each class takes; a key that it does not take is another's, and has no effect on it.
TAKES = {
    "DDIMScheduler": EVERY | CLIPPED | THRESHOLD | {"set_alpha_to_one", "rescale_betas_zero_snr"},
    "DDPMScheduler": EVERY | CLIPPED | THRESHOLD | {"variance_type", "rescale_betas_zero_snr"},
    "PNDMScheduler": EVERY | {"skip_prk_steps", "set_alpha_to_one"},
    "EulerDiscreteScheduler": EVERY
    | SIGMAS
    | {"interpolation_type", "sigma_min", "sigma_max", "timestep_type", "rescale_betas_zero_snr", "final_sigmas_type"},
    "EulerAncestralDiscreteScheduler": EVERY | {"rescale_betas_zero_snr"},
    "LMSDiscreteScheduler": EVERY | SIGMAS,
    "HeunDiscreteScheduler": EVERY | SIGMAS | CLIPPED,
    "KDPM2DiscreteScheduler": EVERY | SIGMAS,
    "KDPM2AncestralDiscreteScheduler": EVERY | SIGMAS,
    "DPMSolverMultistepScheduler": MULTI | MULTI_PP | {"euler_at_final", "use_lu_lambdas", "rescale_betas_zero_snr"},
    "DPMSolverSinglestepScheduler": (MULTI | MULTI_PP) - {"timestep_spacing", "steps_offset"},
    "DEISMultistepScheduler": MULTI | {"algorithm_type"},
    "UniPCMultistepScheduler": MULTI
    | {"predict_x0", "disable_corrector", "solver_p", "final_sigmas_type", "rescale_betas_zero_snr"}
    | {"sigma_min", "sigma_max", "shift_terminal"},
}
FLOWS = "FlowMatchEulerDiscreteScheduler"
# Its keys that are used, and those that have the values under which a sampler here draws the same.
FLOW_USED = {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15}
FLOW_USED |= {"base_image_seq_len": 256, "max_image_seq_len": 4096, "num_train_timesteps": 1000}
FLOW_ONLY: dict[str, tuple[Any, ...]] = {f"use_{kind}_sigmas": (False, None) for kind in ("karras", "exponential", "beta")}
FLOW_ONLY |= {"invert_sigmas": (False,), "shift_terminal": (None,), "time_shift_type": ("exponential",)}
FLOW_ONLY |= {"stochastic_sampling": (False,)}
LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")  # what is meant by no spacing; the others mean linspace
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")  # which spare one step
STOPS = {"DDIMScheduler": True, "PNDMScheduler": False}  # what `set_alpha_to_one` is unless said
EARLY_BETAS = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")  # from 0.00085 to 0.012


def read_schedule(folder: Path) -> tuple[dict[str, Any], str, str, list[str]]:
    """A scheduler's folder -> the config of the noise schedule, what the network says, how steps are spaced, and remarks.

    Raises:
        Refusal: a schedule that this family does not have.
    """
    told = read_config(folder / "scheduler_config.json")
    kind = told.get("_class_name", "scheduler without a class")
    if kind == FLOWS:
        return dict(STRAIGHT), "Flow", _flow_grid(told, folder), []
    if kind not in TAKES and not {"beta_schedule", "beta_start", "beta_end"} <= told.keys():
        raise Refusal(f"{folder} has a {kind} with beta_schedule=None; {', '.join(TAKES)} are known.")
    said = {name: value for name, value in told.items() if name in TAKES.get(kind, _known())}
    wrong = [text for name, (only, text) in REFUSED.items() if said.get(name, only) != only]
    wrong += [f"{n}={v}" for n, v in told.items() if kind in TAKES and n[0] != "_" and n not in _known() and v not in OFF]
    if wrong:
        raise Refusal(f"{folder} has a {kind} with {', '.join(wrong)}, which no model of this family has.")
    schedule, prediction = _schedule(said, kind, folder)
    spacing, remarks = said.get("timestep_spacing"), []
    if spacing is None:
        spacing = "leading" if kind in LEADING else "linspace"
        remarks.append(f"steps: {kind} means {spacing} where timestep_spacing is not said")
    words = ["karras"] if said.get("use_karras_sigmas") else [spacing]
    words += ["sampler.grid.offset=0"] if (words[0], said.get("steps_offset", 0)) == ("leading", 0) else []
    words += ["sampler.grid.spare=1"] if kind in MULTISTEP and words[0] in ("leading", "linspace") else []
    grid = " ".join(words)
    if kind in STOPS and not said.get("set_alpha_to_one", STOPS[kind]):
        remarks.append("steps: the last ends at the first step of the table, not at the data: sampler.grid.last=0.001")
    if said.get("clip_sample", "clip_sample" in TAKES.get(kind, ()) and kind in LEADING):
        remarks.append(f"{kind}: clip_sample=True; latents are not clipped here, nor by the pipelines of Stable Diffusion")
    other = [f"{name}={said[name]}" for name, same in DRAWING.items() if name in said and said[name] not in same]
    remarks += [f"{kind}: {', '.join(other)} is its own way of drawing, which is not the model's"] if other else []
    return schedule, prediction, grid, remarks


def _schedule(said: Mapping[str, Any], kind: str, folder: Path) -> tuple[dict[str, Any], str]:
    name, prediction = said.get("beta_schedule", "linear"), said.get("prediction_type", "epsilon")
    if name not in SCHEDULES:
        raise Refusal(f"{folder} has a {kind} with beta_schedule={name}; {', '.join(SCHEDULES)} are known.")
    if prediction not in PREDICTIONS:
        raise Refusal(f"{folder} has prediction_type={prediction}; {', '.join(PREDICTIONS)} are known.")
    start, end = BETAS["ScaledLinear" if kind in EARLY_BETAS else "DDPM"]
    betas = {"beta_start": said.get("beta_start", start), "beta_end": said.get("beta_end", end)}
    if not all(isinstance(beta, int | float) for beta in betas.values()):
        raise Refusal(f"{folder} has betas from {betas['beta_start']} to {betas['beta_end']}; numbers were wanted.")
    if said.get("num_train_timesteps", 1000) != 1000:
        raise Refusal(
            f"{folder} has num_train_timesteps={said['num_train_timesteps']}; networks of this family are told of 1000."
        )
    zero = {"zero_terminal_snr": True} if said.get("rescale_betas_zero_snr") else {}
    return {"_target_": f"ldm.schedule.{SCHEDULES[name]}", **betas, **zero}, PREDICTIONS[prediction]


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
