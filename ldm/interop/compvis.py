"""Single files as CompVis and Stability publish them: Latent Diffusion, Stable Diffusion 1, 2 and XL, and first stages alone.

Beside FILE may lie FILE's .yaml, as the original code wants it: what the weights do not show is taken from it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_text
from ldm.interop import autoencoder as first_stage
from ldm.interop import bert, unet
from ldm.interop.bundle import (
    BACKBONE,
    Bundle,
    Part,
    autoencoder_shapes,
    recipe_of,
    towers,
    unet_node,
    unet_shapes,
)
from ldm.interop.compvis_config import (
    assumed,
    check_told,
    heads_told,
    layer_told,
    prediction_told,
    scale_told,
    schedule_told,
    told_beside,
    told_of,
)
from ldm.interop.compvis_text import TOWERS, named_as_today, read_texts, write_tower
from ldm.interop.conditions import LABEL, map_node, number_node, with_null, without_null
from ldm.interop.statistics import folded, published_statistics, scale_of
from ldm.interop.tie import bring, give, taken
from ldm.interop.weights import check_numbers

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Left by training, or computed again from settings.
LEFT = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", "denoiser.sigmas")
LEFT += ("model_ema.", f"{VAE}loss.", "loss.", f"{VAE}model_ema.", "scale_factor", "cond_stage_model.logit_scale")
LEFT += ("low_scale_model.", "depth_model.")  # a schedule's tables; another model, which makes depth maps
SAYS_VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which XL's successors are marked
# Tables of rows that are trained, by our name and theirs: of classes, and of the upscaler's noise steps.
TABLES = {
    LABEL: "cond_stage_model.embedding.weight",
    "conditioner.embedders.upscale.table.weight": f"{UNET}label_emb.weight",
}


def read_file(path: Path, weights: Mapping[str, Tensor], prediction: str | None = None) -> Bundle:
    """A single file's tensors. `prediction` (Noise, Velocity) is for Stable Diffusion 2, whose two kinds look alike.

    Raises:
        Refusal: names what is missing, unknown, or undecided.
    """
    told, weights = told_beside(path), named_as_today(weights)
    if not any(name.startswith(UNET) for name in weights):
        if "encoder.conv_in.weight" not in weights:
            raise Refusal(f"{path} is no model in CompVis' or Stability's layout: it begins with {sorted(weights)[:3]}.")
        part, used = _read_autoencoder(weights, "", told, 0.18215)
        _check_left(path, weights, used)
        check_numbers(part.weights, path)
        said = (
            []
            if part.scale is None
            else [f"scale: {part.scale} (Stable Diffusion 1's and 2's is 0.18215, XL's 0.13025, a VQ's 1)"]
        )
        return Bundle(None, {}, {"autoencoder": part}, assumed=said)
    found = unet.settings_of(_below(weights, UNET))
    channels, widths = found.pop("channels"), found.pop("widths")
    check_told(path, told, widths["tokens"])
    found |= heads_told(told)
    shapes = unet_shapes(channels, widths, **found)
    ties = unet.compvis(shapes, found)
    ours = {BACKBONE + name: x for name, x in bring(ties, _averaged(weights), shapes, UNET).items()}
    ours |= {name: weights[theirs] for name, theirs in TABLES.items() if theirs in weights}
    ours |= {LABEL: with_null(ours[LABEL])} if LABEL in ours else {}
    large, table = any(name.startswith("conditioner.") for name in weights), weights.get(f"{UNET}label_emb.weight")
    scale = scale_told(told, weights) or (0.13025 if large else 0.18215 if table is None else 0.08333)
    stage, used = {}, {SAYS_VELOCITY, ZERO_SNR}
    if any(name.startswith(VAE) and not name.startswith(LEFT) for name in weights):
        stage["autoencoder"], read = _read_autoencoder(weights, VAE, told, scale)
        used |= read
    bert_node, bert_weights, bert_read = _read_bert(weights)
    ours |= bert_weights
    condition, parts, read = _read_conditions(weights, widths, channels, table, bert_node, layer_told(told))
    _check_left(path, weights, used | read | bert_read | taken(ties, UNET) | set(TABLES.values()))
    kind, said = _prediction(path, told, weights, prediction, _is_second(parts) and not widths["spatial"], table is not None)
    schedule = schedule_told(path, told, weights) | ({"zero_terminal_snr": True} if ZERO_SNR in weights else {})
    recipe = recipe_of(unet_node(found), condition, kind, schedule)
    missing = assumed(recipe, told, weights, None if stage and stage["autoencoder"].scale is None else scale, said)
    bundle = Bundle(recipe, ours, {**stage, **parts}, assumed=missing, scale=scale)
    for place in (bundle.weights, *(p.weights for p in bundle.parts.values())):
        check_numbers(place, path)
    return bundle


def write_file(bundle: Bundle, path: Path) -> None:
    """FILE.safetensors and FILE.yaml.

    Raises:
        Refusal: the model has something that the layout has no place for.
    """
    part = bundle.parts["autoencoder"]
    scale = scale_of(part)
    if bundle.recipe is None and "codebook" in part.weights:
        scale = scale or 1.0  # alone, it draws the same whatever its statistics
    stage = part.weights if scale is not None else folded(part)
    ties = first_stage.compvis(stage, part.settings())
    if bundle.recipe is None:
        save_tensors(give(ties, stage), path)
        return
    settings = bundle.settings()
    groups = {settings["groups"], part.settings()["groups"]}
    if groups != {32}:
        raise Refusal(f"CompVis' code normalises in 32 groups; this model has {sorted(groups)}. Use --to diffusers.")
    theirs = give(ties, stage, VAE)
    theirs |= give(unet.compvis(bundle.backbone(), settings), bundle.backbone(), UNET)
    theirs |= {name: bundle.weights[ours] for ours, name in TABLES.items() if ours in bundle.weights}
    theirs |= {TABLES[LABEL]: without_null(bundle.weights[LABEL])} if LABEL in bundle.weights else {}
    texts = towers(bundle.recipe["condition"])
    prefixes = TOWERS[:1] if len(texts) == 1 and "number" not in bundle.recipe["condition"] else TOWERS[1:]
    for (place, node), prefix in zip(texts.items(), prefixes):
        theirs |= write_tower(bundle.parts[place], prefix, list(node.get("layers", [-1])))
    if "bert" in bundle.recipe["condition"]:
        theirs |= _write_bert(bundle)
    _check_given(bundle, theirs)
    told = told_of(bundle, scale or 1.0)
    save_tensors(theirs, path)
    write_text(yaml.safe_dump(told, sort_keys=False), path.with_suffix(".yaml"))


def _prediction(
    path: Path, told: Mapping[str, Any], weights: Mapping[str, Tensor], prediction: str | None, second: bool, upscales: bool
) -> tuple[str, bool]:
    """What the network says, and whether a mark or the caller said it."""
    marked = "Velocity" if SAYS_VELOCITY in weights else None
    if marked and prediction not in (None, marked):
        raise Refusal(f"{path} is marked to say velocity ({SAYS_VELOCITY}); leave --prediction {prediction.lower()} out.")
    said = marked or prediction
    return said or prediction_told(path, told, second, upscales), bool(said)


def _read_conditions(
    weights: Mapping[str, Tensor],
    widths: Mapping[str, int],
    channels: int,
    table: Tensor | None,
    text: dict[str, Any],
    layer: int | None,
) -> tuple[dict[str, Any], dict[str, Part], set[str]]:
    """The conditions, their towers by sub-folder, and the names that were used."""
    condition, parts, read = read_texts(weights, layer)
    condition |= text
    classes = weights.get("cond_stage_model.embedding.weight")
    if classes is not None:
        label = {"classes": len(with_null(classes)) - 1, "width": classes.shape[1]}
        condition["label"] = {"_target_": "ldm.condition.label.Label", **label}
    if widths["tokens"] and not condition:
        raise Refusal("The U-Net attends to tokens, and the file holds neither a text tower nor a class table to make them.")
    if widths["vector"] and table is None:
        condition["number"] = number_node(len(parts) == 1)
    return condition | map_node(widths["spatial"], channels, bool(parts) or bool(text), table), parts, read


def _read_bert(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """The text model that was trained with the backbone, if any: its condition, its weights, and the names that were used."""
    if f"{bert.THEIRS}token_emb.weight" not in weights:
        return {}, {}, set()
    theirs = _below(weights, bert.THEIRS)
    settings = bert.settings_of(theirs)
    shapes = bert.bert_shapes(theirs["token_emb.weight"][0], **settings)
    ties = bert.compvis(shapes)
    ours = {bert.OURS + name: x for name, x in bring(ties, weights, shapes, bert.THEIRS).items()}
    used = taken(ties, bert.THEIRS) | {bert.THEIRS + name for name in bert.HEAD}
    return {"bert": bert.node(settings)}, ours, used


def _write_bert(bundle: Bundle) -> dict[str, Tensor]:
    settings, weights = bert.taken_apart(bundle)
    if settings["head_width"] != bert.HEAD_WIDTH:
        raise Refusal(f"CompVis' BERT has 64-wide heads; found condition.bert.head_width={settings['head_width']}.")
    head = {bert.THEIRS + name: x for name, x in bert.head(weights["words.weight"]).items()}
    return give(bert.compvis(weights), weights, bert.THEIRS) | head


def _is_second(parts: Mapping[str, Part]) -> bool:
    """Whether the text tower is Stable Diffusion 2's, a single one of open_clip's."""
    return "condition.text" in parts and not parts["condition.text"].config["quick_gelu"]


def _check_given(bundle: Bundle, theirs: Mapping[str, Tensor]) -> None:
    """Raises ValueError where conditions are told otherwise than the layout has it, so that something was left behind."""
    places = {"Text", "Texts", "Number", "Inpaint", "DepthMap", "Upscale", "Label", "Bert"}
    strange = [f"condition.{n}" for n, c in bundle.recipe["condition"].items() if c["_target_"].split(".")[-1] not in places]
    strange += [f"condition.{n}.slot=vector" for n, c in bundle.recipe["condition"].items() if c.get("slot") == "vector"]
    strange += [n for n in bundle.weights if not n.startswith((BACKBONE, bert.OURS)) and n not in TABLES]
    if strange:
        raise Refusal(f"CompVis' layout has no place for {', '.join(strange[:3])}. Use --to ldm.")


def _read_autoencoder(weights: Mapping[str, Tensor], prefix: str, told: Mapping[str, Any], scale: float) -> tuple[Part, set[str]]:
    config = first_stage.settings_of(_below(weights, prefix))
    shapes = autoencoder_shapes(config)
    ties = first_stage.compvis(shapes, config)
    ours = bring(ties, weights, shapes, prefix)
    quantised = config["_target_"].endswith("VQ")  # published with a scale factor of 1
    said = scale_told(told, weights)
    scale = said or (1.0 if quantised else scale)
    own = published_statistics(config["channels"], scale)
    if quantised:
        own |= {"hits": ours["codebook"].new_zeros(shapes["hits"]), "sums": ours["codebook"].new_zeros(shapes["sums"])}
    return Part(config, ours | own, scale=None if said else scale), taken(ties, prefix)


def _averaged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's weights, each its average where the file holds averages; LitEma leaves the dots out of their names."""
    dotless = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in weights if name.startswith(UNET)}
    return {name: weights.get(average, weights[name]) for name, average in dotless.items()}


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): tuple(x.shape) for name, x in weights.items() if name.startswith(prefix)}


def _check_left(path: Path, weights: Mapping[str, Tensor], used: set[str]) -> None:
    left = [n for n in weights if n not in used and not n.startswith(LEFT) and not n.endswith(("position_ids", "logit_scale"))]
    if left:
        raise Refusal(f"{path} holds {len(left)} tensors that are none of this model's, such as {', '.join(left[:3])}.")
