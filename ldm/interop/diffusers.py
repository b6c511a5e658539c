"""Folders as diffusers' pipelines write and read them: model_index.json and a sub-folder for each part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_json, write_text
from ldm.interop import autoencoder as first_stage
from ldm.interop import bert, unet
from ldm.interop.bundle import (
    BACKBONE,
    Bundle,
    Part,
    autoencoder_shapes,
    read_words,
    recipe_of,
    text_node,
    tower_shapes,
    towers,
    unet_node,
    unet_shapes,
)
from ldm.interop.conditions import map_node, number_node
from ldm.interop.diffusers_config import LOW_RESOLUTION, pipeline_of, scheduler_config, vae_config, vae_settings
from ldm.interop.diffusers_files import take_part
from ldm.interop.diffusers_unet import unet_config, unet_settings
from ldm.interop.schedulers import read_schedule
from ldm.interop.statistics import folded, published_statistics, scale_of
from ldm.interop.text import open_clip_config, transformers, transformers_config
from ldm.interop.tie import give, same
from ldm.interop.tokens import PADDING, read_tokenizer, write_tokenizer
from ldm.interop.weights import read_config
from ldm.tower.clip import FIRST_LEARNED

TABLE = "conditioner.embedders.upscale.table.weight"  # of the upscaler's noise steps
# The parts of a pipeline: those that are read, and those that judge or make maps, and change no picture.
READ = {"unet", "vae", "vqvae", "scheduler", "bert", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"}
BESIDE = {"safety_checker", "feature_extractor", "image_encoder", "depth_estimator", "watermarker", "low_res_scheduler"}


def read_folder(folder: Path) -> Bundle:
    """A pipeline's folder, or that of an autoencoder alone.

    Raises:
        Refusal: names what is missing, unknown, or not of this family.
    """
    if not (folder / "model_index.json").is_file():
        return Bundle(None, {}, {"autoencoder": read_autoencoder(folder)})
    index = read_config(folder / "model_index.json")
    stage = "vqvae" if "vqvae" in index else "vae"
    if "unet" not in index or stage not in index:
        raise Refusal(
            f"{folder} is a {index.get('_class_name')}; of diffusers' pipelines those with a unet and a vae or vqvae, and DiT's, "
            "are known."
        )
    _check_parts(folder, index)
    config = read_config(folder / "unet" / "config.json")
    settings, channels, widths = unet_settings(config)
    shapes = unet_shapes(channels, widths, **settings)
    ties = unet.diffusers(shapes, settings)
    if rows := config.get("num_class_embeds"):
        shapes, ties = {**shapes, TABLE: (rows, widths["vector"])}, {**ties, TABLE: same("class_embedding.weight")}
    ours = take_part(folder / "unet", ties, shapes)
    table = ours.pop(TABLE, None)
    weights = {BACKBONE + name: x for name, x in ours.items()} | ({} if table is None else {TABLE: table})
    condition, parts = _read_texts(folder, index)
    words = None
    if "bert" in index:
        condition["bert"], text, words = _read_bert(folder)
        weights |= text
    if widths["tokens"] and not condition:
        raise Refusal(f"{folder} has a U-Net that attends to tokens, and no text_encoder of CLIP, or bert, to make them.")
    if config.get("addition_embed_type"):
        condition["number"] = _numbers(folder, config, parts, bool(index.get("requires_aesthetics_score")))
    condition |= map_node(widths["spatial"], channels, bool(condition), table)
    schedule, kind, grid, assumed = read_schedule(folder / "scheduler")
    recipe = recipe_of(unet_node(settings), condition, kind, schedule)
    part = read_autoencoder(folder / stage, whitened="XL" in index["_class_name"])
    assumed += [] if part.scale is None else [f"scale: {part.scale}, which AutoencoderKL and VQModel mean where it is not said"]
    return Bundle(recipe, weights, {"autoencoder": part, **parts}, grid, words, assumed=assumed)


def write_folder(bundle: Bundle, folder: Path) -> None:
    """A folder that the pipeline's `from_pretrained` reads; model_index.json, written last, says that it is whole.

    Raises:
        Refusal: the model has something that no pipeline of diffusers can do; names it.
    """
    stage = bundle.parts["autoencoder"]
    if bundle.recipe is None:
        write_autoencoder(stage, folder, alone=True)
        return
    settings, backbone, condition = bundle.settings(), bundle.backbone(), bundle.recipe["condition"]
    scheduler, texts = scheduler_config(bundle.recipe), _texts(bundle)
    index = pipeline_of(bundle.recipe, backbone, len(texts), "codebook" in stage.weights)
    write_autoencoder(stage, folder / ("vqvae" if "vqvae" in index else "vae"))
    network = give(unet.diffusers(backbone, settings), backbone)
    if TABLE in bundle.weights:
        network["class_embedding.weight"] = bundle.weights[TABLE]
        write_json(LOW_RESOLUTION, folder / "low_res_scheduler" / "scheduler_config.json")
    write_json(unet_config(settings, backbone, condition), folder / "unet" / "config.json")
    save_tensors(network, folder / "unet" / "diffusion_pytorch_model.safetensors")
    if "bert" in index:
        _write_bert(bundle, folder)
    slots = [""] if len(texts) == 1 and "text_encoder" in index else ["_2"] if len(texts) == 1 else ["", "_2"]
    for slot, (node, part) in zip(slots, texts):
        _write_text(node, part, folder, slot)
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    write_json(index, folder / "model_index.json")


def read_autoencoder(folder: Path, whitened: bool = True) -> Part:
    """AutoencoderKL's or VQModel's folder. `whitened` says that its pipeline reads the means and deviations by channel.

    Raises:
        Refusal: names what is missing, unknown, or read by nobody.
    """
    config = read_config(folder / "config.json")
    ours = vae_settings(config, folder)
    shapes = autoencoder_shapes(ours)
    weights = take_part(folder, first_stage.diffusers(shapes, ours), shapes)
    scale = config.get("scaling_factor", 0.18215)
    by_channel = {name: config.get(name) for name in ("latents_mean", "latents_std") if config.get(name) is not None}
    if len(by_channel) == 1 or (by_channel and (not whitened or config.get("shift_factor"))):
        raise Refusal(
            f"{folder} says {by_channel}: both are known, without shift_factor, in a pipeline of Stable Diffusion XL; other "
            "pipelines of diffusers draw without them. Take them out of its config.json, if it was trained so."
        )
    mean, std = by_channel.get("latents_mean", config.get("shift_factor") or 0.0), by_channel.get("latents_std", 1.0)
    own = published_statistics(ours["channels"], scale, mean, std)
    if "codebook" in weights:
        own |= {name: weights["codebook"].new_zeros(shapes[name]) for name in ("hits", "sums")}
    return Part(ours, weights | own, scale=None if "scaling_factor" in config else scale)


def write_autoencoder(part: Part, folder: Path, alone: bool = False) -> None:
    """The same folder. A VQ `alone` draws the same whatever its statistics, which are left where they differ by channel."""
    scale = scale_of(part) or (1.0 if alone and "codebook" in part.weights else None)
    weights = part.weights if scale is not None else folded(part)
    write_json(vae_config(part.settings(), scale or 1.0, "codebook" in weights), folder / "config.json")
    save_tensors(give(first_stage.diffusers(weights, part.settings()), weights), folder / "diffusion_pytorch_model.safetensors")


def _read_texts(folder: Path, index: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Part]]:
    """The text condition, and its towers by sub-folder."""
    slots = [slot for slot in ("", "_2") if index.get(f"text_encoder{slot}", [None])[0]]
    names = {"": "large", "_2": "giant"}
    large = "_2" in slots
    nodes, parts = {}, {}
    for slot in slots:
        place = f"condition.text.towers.{names[slot]}" if large else "condition.text"
        parts[place] = _read_tower(folder / f"text_encoder{slot}")
        text = parts[place].config["text_cfg"]
        told = read_tokenizer(folder / f"tokenizer{slot}", text["vocab_size"], text["context_length"])
        if large:
            dropped = "zeros" if index.get("force_zeros_for_empty_prompt", True) else "empty_prompt"
            told |= {"layers": [-2], "final_norm": False, "dropped": dropped, "pooled": slot == "_2"}
        nodes[names[slot]] = text_node(place, **({"layers": [-1], "final_norm": True} | told))
    if not large:
        return {"text": nodes["large"]} if nodes else {}, parts
    return {"text": {"_target_": "ldm.condition.text.Texts", "towers": nodes}}, parts


def _read_bert(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """LDMBertModel's condition, its weights, and its words."""
    config = read_config(folder / "bert" / "config.json")
    settings = bert.diffusers_settings(config)
    shapes = bert.bert_shapes(config["vocab_size"], **settings)
    weights = take_part(folder / "bert", bert.diffusers(shapes), shapes, "model", left=bert.HEAD)
    return bert.node(settings), {bert.OURS + name: x for name, x in weights.items()}, _read_words(folder / "tokenizer")


def _read_words(folder: Path) -> str:
    """The vocab.txt of BertTokenizer's folder, of which late versions write a tokenizer.json alone.

    Raises:
        Refusal: words that are told apart by their case.
    """
    told = folder / "tokenizer_config.json"
    if told.is_file() and not read_config(told).get("do_lower_case", True):
        raise Refusal(f"{told} has do_lower_case=false; the words of this family are BERT's uncased ones.")
    if not (folder / "tokenizer.json").is_file():
        return read_words(folder)
    ids = read_config(folder / "tokenizer.json")["model"]["vocab"]
    return "\n".join(sorted(ids, key=ids.__getitem__)) + "\n"


def _write_bert(bundle: Bundle, folder: Path) -> None:
    settings, weights = bert.taken_apart(bundle)
    write_json(bert.diffusers_config(settings, len(weights["words.weight"])), folder / "bert" / "config.json")
    head = bert.head(weights["words.weight"])
    save_tensors(give(bert.diffusers(weights), weights) | head, folder / "bert" / "model.safetensors")
    write_text(bundle.words, folder / "tokenizer" / "vocab.txt")
    told = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": settings["length"]}
    write_json(told, folder / "tokenizer" / "tokenizer_config.json")


def _check_parts(folder: Path, index: Mapping[str, Any]) -> None:
    """Raises ValueError where a pipeline has a part that nothing here reads, such as a ControlNet."""
    there = {name for name, value in index.items() if isinstance(value, list) and value[:1] not in ([], [None])}
    if strange := sorted(there - READ - BESIDE):
        raise Refusal(f"{folder} is a {index.get('_class_name')} with {', '.join(strange)}, which no model here has.")
    low = folder / "low_res_scheduler" / "scheduler_config.json"
    if low.is_file():
        said, names = read_config(low), ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        if wrong := [f"{name}={said[name]}" for name in names if said.get(name, LOW_RESOLUTION[name]) != LOW_RESOLUTION[name]]:
            raise Refusal(f"{low} has {', '.join(wrong)}; the x4 upscaler's table, {LOW_RESOLUTION}, is known.")


def _numbers(folder: Path, config: Mapping[str, Any], parts: Mapping[str, Part], scored: bool) -> dict[str, Any]:
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
            f"{folder}: its unet is told {count} numbers of {width} beside a text of {pooled} "
            f"(projection_class_embeddings_input_dim={config['projection_class_embeddings_input_dim']}); XL's is told 6, and its "
            "refiner's 5 (requires_aesthetics_score)."
        )
    return number_node(count == 5, width)


def _read_tower(folder: Path) -> Part:
    told = read_config(folder / "config.json")
    config = open_clip_config(told)
    if told.get("eos_token_id") == 2 and told["vocab_size"] > FIRST_LEARNED and config["text_cfg"].get("proj_type") != "none":
        raise Refusal(f"{folder} pools the largest id (eos_token_id=2), a learned one; eos_token_id=49407 is known beside those.")
    shapes = tower_shapes(config)
    return Part(config, take_part(folder, transformers(shapes), shapes, "model"), tower=True)


def _texts(bundle: Bundle) -> list[tuple[dict[str, Any], Part]]:
    """Each text condition with its tower, cut to the layer that is read.

    Raises:
        Refusal: it reads what no pipeline of diffusers reads.
    """
    found, several = [], False
    for place, node in towers(bundle.recipe["condition"]).items():
        several = several or ".towers." in place
        layers, norm = list(node.get("layers", [-1])), node.get("final_norm", True)
        wrong = [f"layers={layers}, final_norm={norm}"] if (layers, norm) not in _readable(several) else []
        wrong += ["whiten=true"] if node.get("whiten") else []
        wrong += [f"padding={node.get('padding')}"] if node.get("padding") not in PADDING.values() else []
        if wrong:
            raise Refusal(f"diffusers' pipelines do not read text with {', '.join(wrong)} ({place}); padding is 0 or 49407.")
        found.append((node, _cut(bundle.parts[place], 1 if layers == [-2] and norm else 0, node.get("pooled", False))))
    return found


def _readable(several: bool) -> list[tuple[list[int], bool]]:
    return [([-2], False)] if several else [([-1], True), ([-2], True)]


def _cut(part: Part, layers: int, pooled: bool) -> Part:
    """A tower without its last blocks, and without a projection that nobody reads."""
    text = dict(part.config["text_cfg"])
    text["layers"] -= layers
    last = tuple(f"transformer.resblocks.{text['layers'] + i}." for i in range(layers))
    weights = {n: x for n, x in part.weights.items() if not (last and n.startswith(last))}
    if not pooled:
        text["proj_type"] = "none"
        weights.pop("text_projection", None)
    return Part({**part.config, "text_cfg": text}, weights, tower=True)


def _write_text(node: Mapping[str, Any], part: Part, folder: Path, slot: str) -> None:
    encoder, tokenizer = folder / f"text_encoder{slot}", folder / f"tokenizer{slot}"
    write_json(transformers_config(part.config), encoder / "config.json")
    save_tensors(give(transformers(part.weights), part.weights), encoder / "model.safetensors")
    length = part.config["text_cfg"]["context_length"]
    write_tokenizer(tokenizer, node["padding"], node.get("learned", ()), length)
