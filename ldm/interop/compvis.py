"""Single files as CompVis and Stability publish them: Stable Diffusion 1, 2 and XL, and their first stages alone.

Beside FILE may lie FILE's .yaml, as the original code wants it: what the weights do not show is taken from it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.folder import save_tensors, write_text
from ldm.interop import autoencoder as first_stage
from ldm.interop import unet
from ldm.interop.bundle import (
    BACKBONE,
    Bundle,
    Part,
    autoencoder_shapes,
    folded,
    published_statistics,
    recipe_of,
    scale_of,
    text_node,
    tower_shapes,
    towers,
    unet_shapes,
)
from ldm.interop.conditions import inpaint_node, number_node
from ldm.interop.text import PREFIX, transformers
from ldm.interop.tie import bring, give, same, taken
from ldm.interop.weights import check_finite, open_weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Left by training, or computed again from settings.
LEFT = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", "denoiser.sigmas")
LEFT += ("model_ema.", f"{VAE}loss.", "loss.", f"{VAE}model_ema.", "scale_factor", "cond_stage_model.logit_scale")
TOWERS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")


def read_file(path: Path, prediction: str | None = None) -> Bundle:
    """A single file. `prediction` (Noise, Velocity) is for Stable Diffusion 2, whose two kinds look alike.

    Raises:
        ValueError: names what is missing, unknown, or undecided.
    """
    weights = open_weights(path)
    told = yaml.safe_load(path.with_suffix(".yaml").read_text()) if path.with_suffix(".yaml").is_file() else {}
    told = told.get("model", {}).get("params", {})
    if not any(name.startswith(UNET) for name in weights):
        if "encoder.conv_in.weight" not in weights:
            raise ValueError(f"{path} is no model in CompVis' or Stability's layout: it begins with {sorted(weights)[:3]}.")
        part, used = _read_autoencoder(weights, "", float(told.get("scale_factor", 0.18215)))
        _check_left(path, weights, used)
        return Bundle(None, {}, {"autoencoder": part})
    found = unet.settings_of(_below(weights, UNET))
    channels, widths = found.pop("channels"), found.pop("widths")
    found |= _heads_told(told)
    shapes = unet_shapes(channels, widths, **found)
    ties = unet.compvis(shapes, found)
    ours = bring(ties, _averaged(weights), shapes, UNET)
    large = any(name.startswith("conditioner.") for name in weights)
    scale = float(told.get("scale_factor", 0.13025 if large else 0.18215))
    part, used = _read_autoencoder(weights, VAE, scale)
    condition, parts, read = _read_texts(weights)
    if widths["vector"]:
        condition["number"] = number_node(refiner=len(parts) == 1)
    condition |= inpaint_node(widths["spatial"], channels)
    _check_left(path, weights, used | read | taken(ties, UNET))
    kind = prediction or _prediction(path, told, widths["tokens"], large)
    start, end = float(told.get("linear_start", 0.00085)), float(told.get("linear_end", 0.012))
    recipe = recipe_of(found, condition, kind, start, end)
    bundle = Bundle(recipe, {BACKBONE + name: x for name, x in ours.items()}, {"autoencoder": part, **parts})
    for place in (bundle.weights, *(p.weights for p in bundle.parts.values())):
        check_finite(place, path)
    return bundle


def write_file(bundle: Bundle, path: Path) -> None:
    """FILE.safetensors and FILE.yaml.

    Raises:
        ValueError: the model has something that the layout has no place for.
    """
    part = bundle.parts["autoencoder"]
    scale = scale_of(part)
    stage = part.weights if scale is not None else folded(part)
    ties = first_stage.compvis(stage, part.config)
    if bundle.recipe is None:
        save_tensors(give(ties, stage), path)
        return
    settings = bundle.settings()
    groups = {settings["groups"], part.config.get("groups", 32)}
    if groups != {32}:
        raise ValueError(f"CompVis' code normalises in 32 groups; this model has {sorted(groups)}. Use --to diffusers.")
    theirs = give(ties, stage, VAE)
    theirs |= give(unet.compvis(bundle.backbone(), settings), bundle.backbone(), UNET)
    texts = towers(bundle.recipe["condition"])
    prefixes = TOWERS[:1] if len(texts) == 1 and "number" not in bundle.recipe["condition"] else TOWERS[1:]
    for (place, node), prefix in zip(texts.items(), prefixes):
        theirs |= _write_tower(bundle.parts[place], prefix, list(node.get("layers", [-1])))
    save_tensors(theirs, path)
    write_text(yaml.safe_dump(_told(bundle, scale or 1.0), sort_keys=False), path.with_suffix(".yaml"))


def _read_autoencoder(weights: Mapping[str, Tensor], prefix: str, scale: float) -> tuple[Part, set[str]]:
    config = first_stage.settings_of(_below(weights, prefix))
    shapes = autoencoder_shapes(config)
    ties = first_stage.compvis(shapes, config)
    ours = bring(ties, weights, shapes, prefix)
    own = published_statistics(config["channels"], scale)
    if config["_target_"].endswith("VQ"):
        own |= {"hits": ours["codebook"].new_zeros(shapes["hits"]), "sums": ours["codebook"].new_zeros(shapes["sums"])}
    return Part(config, ours | own), taken(ties, prefix)


def _read_texts(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Part], set[str]]:
    """The conditions, their towers by sub-folder, and the names that were used."""
    found = [(prefix, _read_tower(weights, prefix)) for prefix in TOWERS if any(n.startswith(prefix) for n in weights)]
    found = [(prefix, part, used) for prefix, (part, used) in found if part is not None]
    read = set().union(*(used for _, _, used in found)) if found else set()
    if [prefix for prefix, _, _ in found] == [TOWERS[0]]:
        part = found[0][1]
        first = {"layers": [-1], "padding": 49407} if part.config["quick_gelu"] else {"layers": [-2], "padding": 0}
        node = text_node("condition.text", final_norm=True, **first)
        return {"text": node}, {"condition.text": part}, read
    nodes, parts = {}, {}
    for _, part, _ in found:
        name = "large" if part.config["quick_gelu"] else "giant"
        place = f"condition.text.towers.{name}"
        giant = {"pooled": True, "padding": 0} if name == "giant" else {"padding": 49407}
        nodes[name] = text_node(place, layers=[-2], final_norm=False, dropped="zeros", **giant)
        parts[place] = part
    text = {"_target_": "ldm.condition.text.Texts", "towers": nodes}
    return ({"text": text} if nodes else {}), parts, read


def _read_tower(weights: Mapping[str, Tensor], prefix: str) -> tuple[Part | None, set[str]]:
    """transformers' layout below `transformer.`, with OpenAI's activation, or open_clip's below `model.`."""
    foreign = any(name.startswith(f"{prefix}transformer.{PREFIX}") for name in weights)
    prefix += "transformer." if foreign else "model."
    shapes = {name.removeprefix(prefix): tuple(weights[name].shape) for name in weights if name.startswith(prefix)}
    if not shapes:
        return None, set()
    embeddings = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    vocabulary, context = [PREFIX + e for e in embeddings] if foreign else ["token_embedding.weight", "positional_embedding"]
    width = shapes[vocabulary][1]
    projection = shapes.get("text_projection.weight" if foreign else "text_projection")
    last = PREFIX + "encoder.layers.{}.layer_norm1.weight" if foreign else "transformer.resblocks.{}.ln_1.weight"
    text = {"context_length": shapes[context][0], "vocab_size": shapes[vocabulary][0], "width": width}
    text |= {"heads": max(1, width // 64), "layers": next(i for i in range(1000) if last.format(i) not in shapes)}
    config = {"embed_dim": projection[-1] if projection else width, "quick_gelu": foreign, "text_cfg": text}
    if projection is None:
        text["proj_type"] = "none"
    wanted = tower_shapes(config)
    ties = transformers(wanted) if foreign else {name: same(name) for name in wanted}
    return Part(config, bring(ties, weights, wanted, prefix), tower=True), taken(ties, prefix)


def _write_tower(part: Part, prefix: str, layers: list[int]) -> dict[str, Tensor]:
    if part.config.get("quick_gelu"):
        weights = {name: x for name, x in part.weights.items() if name != "text_projection"}
        return give(transformers(weights), weights, f"{prefix}transformer.")
    theirs = {f"{prefix}model.{name}": x for name, x in part.weights.items()}
    if layers == [-1]:  # their code reads the last block but one: the last one here gets a double above it, never read
        count = part.config["text_cfg"]["layers"]
        last, above = (f"{prefix}model.transformer.resblocks.{i}." for i in (count - 1, count))
        theirs |= {above + name.removeprefix(last): x.clone() for name, x in theirs.items() if name.startswith(last)}
    return theirs


def _averaged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's weights, each its average where the file holds averages; LitEma leaves the dots out of their names."""
    dotless = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in weights if name.startswith(UNET)}
    return {name: weights.get(average, weights[name]) for name, average in dotless.items()}


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): tuple(x.shape) for name, x in weights.items() if name.startswith(prefix)}


def _check_left(path: Path, weights: Mapping[str, Tensor], used: set[str]) -> None:
    left = [n for n in weights if n not in used and not n.startswith(LEFT) and not n.endswith(("position_ids", "logit_scale"))]
    if left:
        raise ValueError(f"{path} holds {len(left)} tensors that are none of this model's, such as {', '.join(left[:3])}.")


def _heads_told(told: Mapping[str, Any]) -> dict[str, Any]:
    params = told.get("unet_config", told.get("network_config", {})).get("params", {})
    heads, width = params.get("num_heads", -1), params.get("num_head_channels", -1)
    if heads == width == -1:
        return {}
    return {"heads": heads if heads != -1 else 8, "head_width": width if width != -1 else None}


def _prediction(path: Path, told: Mapping[str, Any], tokens: int, large: bool) -> str:
    if "parameterization" in told:
        return {"eps": "Noise", "v": "Velocity", "x0": "Data"}[told["parameterization"]]
    if tokens == 1024 and not large:
        raise ValueError(
            f"{path} is Stable Diffusion 2, of which one kind says noise (base, inpainting, depth) and one velocity (768-v); the "
            f"weights look alike. Say --prediction noise or --prediction velocity, or put its yaml beside it."
        )
    return "Noise"


def _told(bundle: Bundle, scale: float) -> dict[str, Any]:
    """The yaml that the original code, and reading again, take the settings from."""
    s, recipe, stage = bundle.settings(), bundle.recipe, bundle.parts["autoencoder"].config
    kind = recipe["prediction"]["_target_"].split(".")[-1]
    heads = {"num_heads": s["heads"]} if s["head_width"] is None else {"num_head_channels": s["head_width"]}
    backbone = bundle.backbone()
    network = {
        "in_channels": backbone["encoder.0.0.weight"].shape[1],
        "out_channels": backbone["out.2.weight"].shape[0],
        "model_channels": s["width"],
        "attention_resolutions": [2**i for i, depth in enumerate(s["depth"]) if depth],
        "num_res_blocks": s["res_blocks"],
        "channel_mult": list(s["mult"]),
        **heads,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.linear(s),
        "transformer_depth": max(s["depth"]),
        "legacy": False,
    }
    return {
        "model": {
            "params": {
                "parameterization": {"Noise": "eps", "Velocity": "v", "Data": "x0"}[kind],
                "linear_start": recipe["schedule"].get("beta_start", 0.00085),
                "linear_end": recipe["schedule"].get("beta_end", 0.012),
                "timesteps": 1000,
                "scale_factor": scale,
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {"embed_dim": stage["channels"], "ddconfig": _ddconfig(stage)},
                },
            }
        }
    }


def _ddconfig(stage: Mapping[str, Any]) -> dict[str, Any]:
    ours = {"channels": 4, "width": 128, "mult": [1, 2, 4, 4], "res_blocks": 2, **stage}
    return {
        "double_z": stage["_target_"].endswith("KL"),
        "z_channels": ours["channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": ours["width"],
        "ch_mult": list(ours["mult"]),
        "num_res_blocks": ours["res_blocks"],
        "attn_resolutions": [256 // 2**i for i in ours.get("attention", [])],
        "dropout": 0.0,
    }
