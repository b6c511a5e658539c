"""Settings as the .yaml beside a single file says them, or its buffers, or nobody; and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.errors import Refusal
from ldm.interop import bert, unet
from ldm.interop.bundle import BETAS, Bundle, towers
from ldm.interop.weights import Config

PREDICTIONS = {"eps": "Noise", "v": "Velocity", "x0": "Data"}


def told_beside(path: Path) -> dict[str, Any]:
    """What FILE's .yaml says of the model; nothing where there is none.

    Raises:
        Refusal: it is no such file.
    """
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return {}
    try:
        held = Config(yaml.safe_load(beside.read_text()), beside)
    except yaml.YAMLError as error:
        raise Refusal(f"{beside} is not whole YAML ({' '.join(str(error).split())}).") from error
    return Config(Config(held["model"], beside)["params"], beside)


def check_told(path: Path, told: Mapping[str, Any], tokens: int) -> None:
    """Raises ValueError where the yaml beside a file is another model's: its U-Net reads tokens of another width."""
    said = told.get("unet_config", told.get("network_config", {})).get("params", {}).get("context_dim")
    if isinstance(said, int) and said != tokens:
        raise Refusal(f"{path} is not the model of the yaml beside it: context_dim={said} there, {tokens} in the weights.")


def heads_told(told: Mapping[str, Any]) -> dict[str, Any]:
    """How many heads there are, as `UNet` wants it, where the yaml says so."""
    params = told.get("unet_config", told.get("network_config", {})).get("params", {})
    heads, width = params.get("num_heads", -1), params.get("num_head_channels", -1)
    if heads == width == -1:
        return {}
    return {"heads": heads if heads != -1 else 8, "head_width": width if width != -1 else None}


def scale_told(told: Mapping[str, Any], weights: Mapping[str, Tensor]) -> float | None:
    """The scale factor of the latents: the one that was measured in training, else the yaml's, or None."""
    if "scale_factor" in weights:  # of `scale_by_std`; the yaml's was its start
        return float(weights["scale_factor"])
    return float(told["scale_factor"]) if "scale_factor" in told else None


def layer_told(told: Mapping[str, Any]) -> int | None:
    """Which hidden state of open_clip's text tower is read, where the yaml says so: the last, or the last but one."""
    layer = told.get("cond_stage_config", {}).get("params", {}).get("layer")
    return {"last": -1, "penultimate": -2}.get(layer)


def assumed(
    recipe: Mapping[str, Any], told: Mapping[str, Any], weights: Mapping[str, Tensor], scale: float | None, said: bool
) -> list[str]:
    """What nothing in a file, nor beside it, says, and was taken from its family."""
    backbone = recipe["backbone"]
    heads = f"{backbone['heads']} heads" if backbone["head_width"] is None else f"{backbone['head_width']} wide"
    lines = [] if scale is None else [f"scale: {scale}"]
    lines += [] if heads_told(told) or not any(backbone["depth"]) else [f"heads: {heads}"]
    for name, node in towers(recipe["condition"]).items():
        if layer_told(told) is None:
            lines.append(f"hidden layer: {node['layers'][0]} of {name}, heads there 64 wide, tokens cut as CLIPTokenizer's")
    kind = recipe["prediction"]["_target_"].split(".")[-1].lower()
    lines += [] if said or "parameterization" in told else [f"prediction: {kind}"]
    start, end = recipe["schedule"]["beta_start"], recipe["schedule"]["beta_end"]
    lines += [] if "linear_start" in told or "betas" in weights else [f"schedule: ScaledLinear, betas {start} to {end}"]
    return [*lines, "steps: leading, as the published samplers have it (sampler/grid=leading)"]


def schedule_told(path: Path, told: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The noise schedule: the yaml's, else that of the file's own betas, else Stable Diffusion's.

    Raises:
        Refusal: the betas are not of this kind of table.
    """
    if "linear_start" in told or "betas" not in weights:
        start, end = (float(told.get(f"linear_{name}", usual)) for name, usual in zip(("start", "end"), BETAS["ScaledLinear"]))
    else:
        betas = weights["betas"].double()
        start, end = (float(f"{float(betas[i]):.6g}") for i in (0, -1))
        wanted = torch.linspace(start**0.5, end**0.5, len(betas), dtype=torch.float64).square()
        if not torch.allclose(betas, wanted, rtol=1e-4):
            raise Refusal(f"{path}: its betas are no table whose square roots are linear, as this family's are.")
    return {"_target_": "ldm.schedule.ScaledLinear", "beta_start": start, "beta_end": end}


def prediction_told(path: Path, told: Mapping[str, Any], second: bool, upscales: bool) -> str:
    """What the network says. `second`: it is Stable Diffusion 2, told text alone; `upscales`: its x4 upscaler.

    Raises:
        Refusal: Stable Diffusion 2's two kinds look alike.
    """
    if (kind := told.get("parameterization")) is not None:
        if kind not in PREDICTIONS:
            raise Refusal(f"{path.with_suffix('.yaml')} has parameterization={kind}; {', '.join(PREDICTIONS)} are known.")
        return PREDICTIONS[kind]
    if upscales:
        return "Velocity"
    if second:
        raise Refusal(
            f"{path} is Stable Diffusion 2, of which one kind says noise (base) and one velocity (768-v); the weights look alike."
            " Say --prediction noise or --prediction velocity, or put its yaml beside it."
        )
    return "Noise"


def told_of(bundle: Bundle, scale: float) -> dict[str, Any]:
    """The yaml that the original code, and reading again, take the settings from.

    Raises:
        Refusal: the schedule or the prediction has no place there.
    """
    s, recipe, stage = bundle.settings(), bundle.recipe, bundle.parts["autoencoder"]
    kind, schedule = (recipe[name]["_target_"].split(".")[-1] for name in ("prediction", "schedule"))
    words = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if kind not in words or schedule != "ScaledLinear" or recipe["schedule"].get("zero_terminal_snr"):
        raise Refusal(
            f"CompVis' code knows schedule=scaled_linear without zero_terminal_snr, and prediction=noise, velocity or data; this "
            f"model has {recipe['schedule']} and {kind}. Use --to diffusers, or --to ldm."
        )
    start, end = BETAS["ScaledLinear"]
    params = {
        "parameterization": words[kind],
        "linear_start": recipe["schedule"].get("beta_start", start),
        "linear_end": recipe["schedule"].get("beta_end", end),
        "timesteps": 1000,
        "scale_factor": scale,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _network(bundle.backbone(), s)},
        "first_stage_config": _first_stage(stage.settings(), "codebook" in stage.weights),
    }
    if "bert" in recipe["condition"]:
        params["cond_stage_config"] = _bert(bundle)
    return {"model": {"params": params}}


def _network(backbone: Mapping[str, Tensor], s: Mapping[str, Any]) -> dict[str, Any]:
    heads = {"num_heads": s["heads"]} if s["head_width"] is None else {"num_head_channels": s["head_width"]}
    tokens = next((x.shape[1] for name, x in backbone.items() if name.endswith("attend_tokens.k.weight")), None)
    return {
        "in_channels": backbone["encoder.0.0.weight"].shape[1],
        "out_channels": backbone["out.2.weight"].shape[0],
        "model_channels": s["width"],
        "attention_resolutions": [2**i for i, depth in enumerate(s["depth"]) if depth],
        "num_res_blocks": s["res_blocks"],
        "channel_mult": list(s["mult"]),
        **heads,
        "use_spatial_transformer": unet.has_transformers(backbone),
        **({} if tokens is None else {"context_dim": tokens}),
        "use_linear_in_transformer": unet.linear(s),
        "transformer_depth": max(s["depth"]),
        "use_scale_shift_norm": s["scale_shift"],
        "resblock_updown": s["res_resample"],
        "legacy": False,
    }


def _bert(bundle: Bundle) -> dict[str, Any]:
    settings, weights = bert.taken_apart(bundle)
    params = {"n_embed": settings["width"], "n_layer": settings["depth"], "max_seq_len": settings["length"]}
    params["vocab_size"] = len(weights["words.weight"])
    return {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": params}


def _first_stage(ours: Mapping[str, Any], quantised: bool) -> dict[str, Any]:
    network = {
        "double_z": not quantised,
        "z_channels": ours["channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": ours["width"],
        "ch_mult": list(ours["mult"]),
        "num_res_blocks": ours["res_blocks"],
        "attn_resolutions": [256 // 2**i for i in ours["attention"]],
        "dropout": 0.0,
    }
    params = {"embed_dim": ours["channels"], "ddconfig": network, **({"n_embed": ours["codes"]} if quantised else {})}
    return {"target": f"ldm.models.autoencoder.{'VQModelInterface' if quantised else 'AutoencoderKL'}", "params": params}
