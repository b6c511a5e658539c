"""The U-Net of Latent Diffusion and Stable Diffusion 1, 2 and XL, and what whole models on it are told."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.backbone.unet import UNet
from ldm.errors import Refusal
from ldm.interop.bundle import BACKBONE, VERSION, Bundle, Part, shapes_of
from ldm.interop.conditions import EDIT, IDENTITY, LABEL, map_node, number_node
from ldm.interop.files import today
from ldm.interop.keys import whole
from ldm.interop.network._unet_config import unet_config, unet_settings
from ldm.interop.network._unet_index import XL_EDITS, pipeline_of
from ldm.interop.network._unet_names import compvis, diffusers, has_transformers, linear, settings_of
from ldm.interop.protocols import Built, Network, Ties
from ldm.interop.source import File, inner
from ldm.interop.statistics import scale_of
from ldm.interop.tie import Shapes, Tie, check_whole, same
from ldm.interop.weights import read_config
from ldm.nn.layers import identity, mlp
from ldm.types import Widths

STEPS = "conditioner.embedders.upscale.table.weight"  # rows of the upscaler's noise steps
CLIP = "ldm.condition.text.Text"
TABLES = {LABEL: "cond_stage_model.embedding.weight", STEPS: "model.diffusion_model.label_emb.weight"}
LOW_RESOLUTION = {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION, "num_train_timesteps": 1000}
LOW_RESOLUTION |= {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
PLACES = {"Text", "Texts", "Number", "Edit", "Inpaint", "DepthMap", "Upscale", "Label", "Bert"}


class UNetNetwork(Network):
    """Told tokens of text or of a class, XL's numbers, a map."""

    name = "U-Net"
    target = "ldm.backbone.unet.UNet"
    made = UNet
    folder = "unet"
    classes = ("UNet2DConditionModel", "UNet2DModel")
    prefix = "model.diffusion_model."

    def settings_of(self, shapes: Shapes, told: Mapping[str, Any]) -> Built:
        """CompVis' names and shapes; heads as the yaml says."""
        found = settings_of(shapes)
        channels, widths = found.pop("channels"), found.pop("widths")
        said = _params(told).get("context_dim")
        if isinstance(said, int) and said != widths["tokens"]:
            raise Refusal(
                f"The file is not the model of the yaml beside it: context_dim={said} there, {widths['tokens']} in the weights."
            )
        return found | heads_told(told), channels, widths

    def read_config(self, config: Mapping[str, Any]) -> Built:
        """UNet2DConditionModel's or UNet2DModel's."""
        return unet_settings(config)

    def config(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """The same."""
        return unet_config(settings, bundle.backbone(), bundle.recipe["condition"])

    def single_ties(self, names: Iterable[str], settings: Mapping[str, Any], prediction: str) -> Ties:
        """CompVis' and Stability's."""
        return compvis(names, settings)

    def diffusers_ties(self, names: Iterable[str], settings: Mapping[str, Any]) -> Ties:
        """UNet2DConditionModel's, or UNet2DModel's."""
        return diffusers(names, settings)

    def today(self, name: str) -> str:
        """Attention to the picture alone had other names."""
        return today(name)

    def averaged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LitEma leaves the dots out of the names of its averages."""
        dotless = {n: "model_ema." + n.removeprefix("model.").replace(".", "") for n in weights if n.startswith(self.prefix)}
        return {**weights, **{name: weights[average] for name, average in dotless.items() if average in weights}}

    def shapes(self, channels: int, widths: Mapping[str, int], settings: Mapping[str, Any]) -> Shapes:
        """A vector is added as it is where the settings say so, else mixed."""
        vector = identity if "vector" in settings else mlp
        with torch.device("meta"):
            return shapes_of(UNet(channels, Widths(**widths), **{**settings, "vector": vector}))

    def channels(self, bundle: Bundle) -> int:
        """As many as it says."""
        return bundle.weights[f"{BACKBONE}out.2.weight"].shape[0]

    def tokens(self, bundle: Bundle) -> int | None:
        """As wide as its keys read."""
        return next((x.shape[1] for name, x in bundle.backbone().items() if name.endswith("attend_tokens.k.weight")), None)

    def check(self, bundle: Bundle, place: str) -> None:
        """Its tensors are those of its config."""
        backbone, settings = bundle.backbone(), self.settings(bundle)
        ties = compvis(backbone, settings)
        found = settings_of({tie.theirs[0]: tuple(tie.split(backbone[name])[0].shape) for name, tie in ties.items()})
        vector = {"vector": IDENTITY} if "vector.0.weight" not in backbone else {}
        check_whole(backbone, self.shapes(found["channels"], found["widths"], {**settings, **vector}), place)

    def brought(self, bundle: Bundle) -> Bundle:
        """InstructPix2Pix is told latents that no scale factor whitens; the first convolution takes it up, exactly but for
        rounding.
        """
        return _edited(bundle, bundle.parts.get("autoencoder"), torch.mul)

    def given(self, bundle: Bundle) -> Bundle:
        """Where a layout has the scale factor; measured statistics, by channel, become part of the autoencoder itself."""
        part = bundle.parts["autoencoder"]
        return bundle if scale_of(part) is None else _edited(bundle, part, torch.div)

    def check_single(self, bundle: Bundle) -> None:
        """Groups of 32, and conditions that are told as CompVis' are."""
        groups = {self.settings(bundle)["groups"], bundle.parts["autoencoder"].settings()["groups"]}
        if groups != {32}:
            raise Refusal(f"CompVis' code normalises in 32 groups; this model has {sorted(groups)}. Use --to diffusers.")
        condition = bundle.recipe["condition"].items()
        strange = [f"condition.{n}" for n, c in condition if c["_target_"].split(".")[-1] not in PLACES]
        strange += [f"condition.{n}.slot=vector" for n, c in condition if c.get("slot") == "vector"]
        if {EDIT, number_node(False)["_target_"]} <= {node["_target_"] for _, node in condition}:
            raise Refusal("an edit of Stable Diffusion XL is known in diffusers' layout alone: use --to diffusers.")
        if strange:
            raise Refusal(f"CompVis' layout has no place for {', '.join(strange[:3])}. Use --to ldm.")

    def tables(self) -> dict[str, str]:
        """Of classes, and of the upscaler's noise steps."""
        return TABLES

    def diffusers_tables(self, config: Mapping[str, Any], built: Built) -> dict[str, tuple[Tie, tuple[int, ...]]]:
        """Of the upscaler's noise steps."""
        rows = config.get("num_class_embeds")
        return {STEPS: (same("class_embedding.weight"), (rows, built[2]["vector"]))} if rows else {}

    def diffusers_rows(self, bundle: Bundle) -> dict[str, Tensor]:
        """The same."""
        return {"class_embedding.weight": bundle.weights[STEPS]} if STEPS in bundle.weights else {}

    def check_folder(self, folder: Path) -> None:
        """The upscaler's pipeline adds noise to the small picture by DDPM's table."""
        path = folder / "low_res_scheduler" / "scheduler_config.json"
        said = read_config(path) if path.is_file() else {}
        names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        if wrong := [f"{name}={said[name]}" for name in names if said.get(name, LOW_RESOLUTION[name]) != LOW_RESOLUTION[name]]:
            raise Refusal(f"{path} has {', '.join(wrong)}; the x4 upscaler's table, {LOW_RESOLUTION}, is known.")

    def beside_folder(self, bundle: Bundle) -> dict[str, dict[str, Any]]:
        """The same."""
        return {"low_res_scheduler/scheduler_config.json": LOW_RESOLUTION} if STEPS in bundle.weights else {}

    def conditions(self, bundle: Bundle, built: Built, config: Mapping[str, Any] | None, index: Mapping[str, Any]) -> None:
        """A class by its table, XL's numbers, maps by the channels that are not noisy."""
        _, channels, widths = built
        condition, table = bundle.recipe["condition"], bundle.weights.get(STEPS)
        towers = {place: part for place, part in bundle.parts.items() if part.kind == "clip"}
        if (classes := bundle.weights.get(LABEL)) is not None:
            label = {"classes": len(classes) - 1, "width": classes.shape[1]}
            condition["label"] = {"_target_": "ldm.condition.label.Label", **label}
        if widths["tokens"] and not condition:
            raise Refusal(
                "The U-Net attends to tokens, and there is neither a text tower (text_encoder) nor a class table to make them."
            )
        if config is None and widths["vector"] and table is None:
            condition["number"] = number_node(len(towers) == 1)
        if config is not None and config.get("addition_embed_type"):
            condition["number"] = _numbers(config, towers, bool(index.get("requires_aesthetics_score")))
        edits = index.get("_class_name") == XL_EDITS and not index.get("is_cosxl_edit")
        condition |= map_node(widths["spatial"], channels, condition.keys() - {"label"}, table, edits)

    def scale(self, file: File) -> float:
        """XL's, the upscaler's, or Stable Diffusion 1's and 2's."""
        if any(name.startswith("conditioner.") for name in file.weights):
            return 0.13025
        return 0.08333 if TABLES[STEPS] in file.weights else 0.18215

    def says(self, file: File, bundle: Bundle, built: Built, prediction: str | None) -> str:
        """Noise, but for the upscaler.

        Raises:
            Refusal: Stable Diffusion 2's two kinds look alike.
        """
        if (said := prediction or file.prediction()) is not None:
            return said
        if STEPS in bundle.weights:
            return "Velocity"
        texts = [n for n in bundle.recipe["condition"].values() if n["_target_"] == CLIP]
        second = texts and not next(p for p in bundle.parts.values() if p.kind == "clip").config["quick_gelu"]
        if second and not built[2]["spatial"]:
            raise Refusal(
                f"{file.path} is Stable Diffusion 2, of which one kind says noise (base) and one velocity (768-v); the weights "
                "look alike. Say --prediction noise or --prediction velocity, or put its yaml beside it."
            )
        return "Noise"

    def assumed(self, file: File, bundle: Bundle, prediction: str | None) -> list[str]:
        """Heads, and what a yaml says."""
        backbone, schedule = bundle.recipe["backbone"], bundle.recipe["schedule"]
        heads = f"{backbone['heads']} heads" if backbone["head_width"] is None else f"{backbone['head_width']} wide"
        lines = [] if heads_told(file.told) or not any(backbone["depth"]) else [f"heads: {heads}"]
        kind = bundle.recipe["prediction"]["_target_"].split(".")[-1].lower()
        lines += [] if prediction or file.prediction() else [f"prediction: {kind}"]
        betas = f"betas {schedule['beta_start']} to {schedule['beta_end']}"
        lines += [] if "linear_start" in file.told or "betas" in file.weights else [f"schedule: ScaledLinear, {betas}"]
        return [*lines, "steps: leading, as the published samplers have it (sampler/grid=leading)"]

    def beside(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """UNetModel's parameters."""
        params = _model(bundle.backbone(), settings)
        return {"unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}}

    def pipeline(self, bundle: Bundle) -> dict[str, Any]:
        """By its conditions."""
        texts = sum(part.kind == "clip" for part in bundle.parts.values())
        return pipeline_of(bundle.recipe, bundle.backbone(), texts, "codebook" in bundle.parts["autoencoder"].weights)

    def describe(self, bundle: Bundle) -> str:
        """Its sizes."""
        s, count = self.settings(bundle), sum(x.numel() for x in bundle.backbone().values())
        heads = f"{s['heads']} heads" if s["head_width"] is None else f"{s['head_width']}-wide heads"
        return f"U-Net        {count:,} parameters: width {s['width']}, mult {s['mult']}, depth {s['depth']}, {heads}"


def heads_told(told: Mapping[str, Any]) -> dict[str, Any]:
    """How many heads there are, as `UNet` wants it, where the yaml says so."""
    params = _params(told)
    heads, width = params.get("num_heads", -1), params.get("num_head_channels", -1)
    if not all(number == -1 or whole(number) for number in (heads, width)):
        raise Refusal(f"The yaml has num_heads={heads}, num_head_channels={width}; whole numbers above 0, or -1, were wanted.")
    if heads == width == -1:
        return {}
    return {"heads": heads if heads != -1 else 8, "head_width": width if width != -1 else None}


def _edited(bundle: Bundle, part: Part | None, change: Callable[[Tensor, Tensor], Tensor]) -> Bundle:
    """What the first convolution weighs the latents of an edit's picture by, times or over their deviation.

    Raises:
        Refusal: they have a mean, which no convolution with zeros around it takes up.
    """
    if bundle.made_by(EDIT) is None:
        return bundle
    channels = bundle.weights[f"{BACKBONE}out.2.weight"].shape[0]
    std = torch.full((channels,), 1 / (bundle.scale or 1.0)) if part is None else part.weights["std"]
    if part is not None and bool(part.weights["mean"].any()):
        raise Refusal("condition.edit: its autoencoder's latents have a mean (latents_mean, shift_factor); one of 0 is known.")
    weight = bundle.weights[f"{BACKBONE}encoder.0.0.weight"].clone()
    weight[:, -channels:] = change(weight[:, -channels:], std.to(weight)[:, None, None])
    return replace(bundle, weights={**bundle.weights, f"{BACKBONE}encoder.0.0.weight": weight})


def _params(told: Mapping[str, Any]) -> Mapping[str, Any]:
    return inner(told, "unet_config.params") or inner(told, "network_config.params") or {}


def _numbers(config: Mapping[str, Any], parts: Mapping[str, Part], scored: bool) -> dict[str, Any]:
    """The numbers that XL's network, or its refiner's, is told beside the text.

    Raises:
        Refusal: so many are none of theirs.
    """
    width, last = config["addition_time_embed_dim"], list(parts.values())[-1].config if parts else {}
    if last.get("text_cfg", {}).get("proj_type") == "none":  # which are another model's; the widths of the tokens say so
        return number_node(len(parts) == 1, width)
    pooled = last.get("embed_dim", 0)
    count, rest = divmod(config["projection_class_embeddings_input_dim"] - pooled, width)
    if rest or count != (5 if scored or len(parts) == 1 else 6):
        raise Refusal(
            f"The unet is told {count} numbers of {width} beside a text of {pooled} "
            f"(projection_class_embeddings_input_dim={config['projection_class_embeddings_input_dim']}); XL's is told 6, and its "
            "refiner's 5 (requires_aesthetics_score)."
        )
    return number_node(count == 5, width)


def _model(backbone: Mapping[str, Tensor], s: Mapping[str, Any]) -> dict[str, Any]:
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
        "use_spatial_transformer": has_transformers(backbone),
        **({} if tokens is None else {"context_dim": tokens}),
        "use_linear_in_transformer": linear(s),
        "transformer_depth": max(s["depth"]),
        "use_scale_shift_norm": s["scale_shift"],
        "resblock_updown": s["res_resample"],
        "legacy": False,
    }


NETWORK = UNetNetwork()
