"""Whole models on a DiT: files as facebookresearch/DiT, SiT and LightningDiT publish them, and folders of diffusers' DiTPipeline.

A published file holds the network and its class table alone; the autoencoder comes from elsewhere.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.backbone.dit import grid_waves
from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_json
from ldm.interop import dit
from ldm.interop.bundle import BACKBONE, BETAS, DISCRETE, Bundle, recipe_of
from ldm.interop.conditions import LABEL, with_null, without_null
from ldm.interop.diffusers import read_autoencoder, write_autoencoder
from ldm.interop.diffusers_config import VERSION, scheduler_config
from ldm.interop.diffusers_files import take_part
from ldm.interop.keys import check_keys
from ldm.interop.schedulers import read_schedule
from ldm.interop.tie import bring, check_whole, give, taken
from ldm.interop.weights import check_numbers, read_config

ROWS = 1001  # of the class table that diffusers' pipeline wants; it knows no label by its last


def read_file(path: Path, weights: Mapping[str, Tensor], prediction: str | None = None) -> Bundle:
    """A published file. `prediction` (Noise, Flow) is for DiT and SiT, which look alike; LightningDiT's is Flow.

    Raises:
        Refusal: names what is missing, unknown, or undecided.
    """
    settings, channels = dit.settings_of({name: tuple(x.shape) for name, x in weights.items()})
    if prediction is None and not settings["rms_norm"]:
        raise Refusal(
            f"{path} is a DiT, which says noise, or a SiT, which says flow; the weights look alike. Say --prediction noise or "
            "--prediction flow."
        )
    kind = prediction or "Flow"
    shapes = dit.dit_shapes(channels, **settings)
    ties = dit.published(shapes, settings["swiglu"], reverse=kind == "Flow")
    ours = bring(ties, weights, shapes)
    left = sorted(n for n in weights.keys() - taken(ties) - {dit.TABLE} if not n.startswith(dit.ROTARY))
    if left:
        raise Refusal(f"{path} holds {len(left)} tensors that are none of this model's, such as {', '.join(left[:3])}.")
    check_numbers(ours, path)
    bundle = _bundle(settings, ours, with_null(weights[dit.TABLE]), kind)
    bundle.scale = 0.18215
    bundle.assumed = [f"heads: {settings['heads']}, as published networks {settings['width']} wide have"]
    bundle.assumed += [] if kind == "Flow" else ["schedule: DDPM's, betas 0.0001 to 0.02"]
    bundle.assumed += [] if prediction else ["prediction: flow, as LightningDiT's"]
    return bundle


def write_file(bundle: Bundle, path: Path) -> None:
    """The network and its class table in one safetensors file.

    Raises:
        Refusal: the published code has no place for something in it.
    """
    settings = _settings(bundle)
    wanted = dit.HEADS.get(settings["width"], max(1, settings["width"] // 64))
    if settings["heads"] != wanted:
        raise Refusal(f"A file does not say how many heads there are; published networks as wide have {wanted}, not this one.")
    kind, backbone = bundle.recipe["prediction"]["_target_"].split(".")[-1], bundle.backbone()
    ties = dit.published(backbone, settings["swiglu"], reverse=kind == "Flow")
    save_tensors({**give(ties, backbone), dit.TABLE: without_null(bundle.weights[LABEL])}, path)


def read_folder(folder: Path) -> Bundle:
    """A folder of diffusers' DiTPipeline.

    Raises:
        Refusal: names what is missing, unknown, or not of this family.
    """
    config = read_config(folder / "transformer" / "config.json")
    if (
        config.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel")
        or config.get("num_embeds_ada_norm") is None
    ):
        raise Refusal(f"{folder}/transformer is a {config.get('_class_name')}; of transformers the DiT of 2212.09748 is known.")
    check_keys(config, config["_class_name"], f"{folder}/transformer")
    depth, channels = config["num_layers"], config["in_channels"]
    outward = config.get("out_channels") or channels
    if outward not in (channels, 2 * channels):
        raise Refusal(f"{folder}/transformer has out_channels={outward}; {channels}, or as many again for ranges, are known.")
    settings = {
        "size": config["sample_size"],
        "patch": config["patch_size"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": depth,
        "heads": config["num_attention_heads"],
        "learn_range": outward == 2 * channels,
    }
    shapes = dit.dit_shapes(channels, **settings)
    rows = {"table": (config["num_embeds_ada_norm"] + 1, settings["width"])}
    ties = {**dit.diffusers(shapes, depth), **dit.diffusers_table(depth)}
    ours = take_part(folder / "transformer", ties, {**shapes, **rows}, left=("pos_embed.pos_embed",))
    ours["position"] = grid_waves(settings["size"] // settings["patch"], settings["width"])
    table, (schedule, prediction, grid, assumed) = ours.pop("table"), read_schedule(folder / "scheduler")
    bundle = _bundle(settings, ours, table, prediction, schedule)
    bundle.grid, bundle.assumed = grid, assumed
    bundle.parts["autoencoder"] = read_autoencoder(folder / "vae")
    return bundle


def write_folder(bundle: Bundle, folder: Path) -> None:
    """A folder that `DiTPipeline.from_pretrained` reads.

    Raises:
        Refusal: the model has something that it cannot do; names it.
    """
    settings, backbone = _settings(bundle), bundle.backbone()
    ours = [name for name in ("rms_norm", "swiglu", "rotary", "norm_heads") if settings[name]]
    if ours:
        raise Refusal(f"diffusers' DiTPipeline knows the DiT of 2212.09748; this one has backbone.{', backbone.'.join(ours)}.")
    scheduler, depth, channels = scheduler_config(bundle.recipe), settings["depth"], backbone["embed.weight"].shape[1]
    table = bundle.weights[LABEL]
    if len(table) > ROWS:
        raise Refusal(f"diffusers' DiTPipeline knows {ROWS - 1} classes; this model has {len(table) - 1}.")
    between = table.new_zeros(ROWS - len(table), table.shape[1])
    ties = {**dit.diffusers(backbone, depth), **dit.diffusers_table(depth)}
    theirs = give(ties, {**backbone, "table": torch.cat((table[:-1], between, table[-1:]))})
    config = {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": VERSION,
        "num_attention_heads": settings["heads"],
        "attention_head_dim": settings["width"] // settings["heads"],
        "in_channels": channels,
        "out_channels": channels * (2 if settings["learn_range"] else 1),
        "num_layers": depth,
        "sample_size": settings["size"],
        "patch_size": settings["patch"],
        "num_embeds_ada_norm": ROWS - 1,
    }
    write_autoencoder(bundle.parts["autoencoder"], folder / "vae")
    write_json(config, folder / "transformer" / "config.json")
    save_tensors(theirs, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": VERSION, "id2label": _names(bundle)}
    index |= {"transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    write_json({**index, "scheduler": ["diffusers", "DDIMScheduler"]}, folder / "model_index.json")


def _bundle(
    settings: dict[str, Any], ours: dict[str, Tensor], table: Tensor, kind: str, schedule: dict[str, Any] | None = None
) -> Bundle:
    label = {"classes": len(table) - 1, "width": settings["width"], "slot": "vector"}
    flow = kind == "Flow"
    usual = (
        {"_target_": "ldm.schedule.Linear"}
        if flow
        else {"_target_": "ldm.schedule.DDPM", **dict(zip(("beta_start", "beta_end"), BETAS["DDPM"]))}
    )
    level = {"_target_": "ldm.denoiser.DataTime"} if flow else DISCRETE
    condition = {"label": {"_target_": "ldm.condition.label.Label", **label}}
    recipe = recipe_of(dit.node(settings), condition, kind, schedule or usual, level)
    return Bundle(recipe, {**{BACKBONE + name: x for name, x in ours.items()}, LABEL: table})


def _settings(bundle: Bundle) -> dict[str, Any]:
    """How the network is built, where a class alone is told it, as a vector.

    Raises:
        Refusal: it is told otherwise.
    """
    told = list(bundle.recipe["condition"])
    mixes = any(name.startswith("vector.") for name in bundle.backbone())
    if told != ["label"] or mixes:
        raise Refusal(
            f"Other layouts know DiT with a class alone, whose table is added as it is; this one is told {told}"
            f"{' through an MLP (backbone.vector)' if mixes else ''}."
        )
    settings, backbone = bundle.settings(), bundle.backbone()
    channels = backbone["embed.weight"].shape[1] if "embed.weight" in backbone else 0
    check_whole(backbone, dit.dit_shapes(channels, **settings), "The backbone")
    return settings


def _names(bundle: Bundle) -> dict[str, str]:
    classes = bundle.recipe["condition"]["label"]["classes"]
    return {} if isinstance(classes, int) else {str(i): name for i, name in enumerate(classes)}
