"""The first stages' tensors, KL and VQ, by CompVis' names and by diffusers', and their settings read off the shapes."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import read_recipe, read_weights, save_model, save_tensors, without_usual, write_json
from ldm.interop import protocols
from ldm.interop.bundle import AUTOENCODERS, Bundle, Part, autoencoder_shapes, home_of
from ldm.interop.files import take_part, today
from ldm.interop.find import network_of
from ldm.interop.part import _autoencoder_config
from ldm.interop.part._autoencoder_config import vae_config, vae_settings
from ldm.interop.source import LEFT, File
from ldm.interop.statistics import folded, published_statistics, scale_of
from ldm.interop.tie import Tie, check_whole, give, kernel, renamer, same, tied
from ldm.interop.weights import check_numbers, class_of, read_config

TARGETS = ("ldm.autoencoder.kl.KL", "ldm.autoencoder.vq.VQ")
STATISTICS = ("mean", "std", "count", "hits", "sums")  # ours alone
MIDDLE = {"0": ("block_1", "resnets.0"), "1": ("attn_1", "attentions.0"), "2": ("block_2", "resnets.1")}
COMPVIS = renamer({"skip": "nin_shortcut", "out": "proj_out"})
RESNET = renamer({"skip": "conv_shortcut"})
ATTENTION = renamer({"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"})


def compvis(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Tie]:
    """Our names -> CompVis', below `first_stage_model.`."""
    levels = len(settings["mult"])

    def tie(name: str) -> Tie:
        if name == "codebook":
            return same("quantize.embedding.weight")
        place = _place(name)
        if place is None:
            return same(name)
        side, level, j, tail = place
        if level is None:
            theirs = f"{side}.mid.{MIDDLE[j][0]}.{COMPVIS(tail)}"
        else:
            number, kind = int(level) if side == "encoder" else levels - 1 - int(level), "down" if side == "encoder" else "up"
            part = _part(j, tail, settings, side, level, {"sample": f"{kind}sample.conv", "block": "block", "attend": "attn"})
            theirs = f"{side}.{kind}.{number}.{part}.{COMPVIS(tail)}"
        return kernel(theirs, 2) if tail in ("q.weight", "k.weight", "v.weight", "out.weight") else same(theirs)

    return tied((n for n in names if n not in STATISTICS), tie)


def diffusers(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Tie]:
    """Our names -> those of diffusers' AutoencoderKL and VQModel."""

    def tie(name: str) -> Tie:
        if name == "codebook":
            return same("quantize.embedding.weight")
        place = _place(name)
        if place is None:
            return same(name.replace("norm_out", "conv_norm_out"))
        side, level, j, tail = place
        if level is None:
            return same(f"{side}.mid_block.{MIDDLE[j][1]}.{ATTENTION(tail) if j == '1' else RESNET(tail)}")
        kind = "down" if side == "encoder" else "up"
        words = {"sample": f"{kind}samplers.0.conv", "block": "resnets", "attend": "attentions"}
        renamed = ATTENTION(tail) if _attends(tail) else RESNET(tail)
        return same(f"{side}.{kind}_blocks.{level}.{_part(j, tail, settings, side, level, words)}.{renamed}")

    return tied((n for n in names if n not in STATISTICS), tie)


def settings_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """CompVis' names (below `first_stage_model.`) and shapes -> how `KL` or `VQ` is built, `_target_` with it.

    Raises:
        Refusal: this is no such autoencoder.
    """
    try:
        width, levels = shapes["encoder.conv_in.weight"][0], 1 + max(_numbers(shapes, r"encoder\.down\.(\d+)\..+"))
        found = {
            "channels": shapes.get("post_quant_conv.weight", shapes["decoder.conv_in.weight"])[1],
            "width": width,
            "mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // width for i in range(levels)],
            "res_blocks": 1 + max(_numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\..+")),
            "attention": sorted(set(_numbers(shapes, r"encoder\.down\.(\d+)\.attn\..+"))),
        }
    except (KeyError, ValueError) as error:
        found = f"{error} is missing" if isinstance(error, KeyError) else "levels are missing"
        raise Refusal(f"This is no autoencoder in CompVis' layout: {found} among its tensors.") from error
    codes = shapes.get("quantize.embedding.weight")
    if codes is None:
        return {"_target_": "ldm.autoencoder.kl.KL", **found, **({} if "quant_conv.weight" in shapes else {"quant_conv": False})}
    return {"_target_": "ldm.autoencoder.vq.VQ", **found, "codes": codes[0]}


def _place(name: str) -> tuple[str, str | None, str, str] | None:
    """encoder.levels.0.1.conv1.weight -> encoder, 0, 1, conv1.weight; decoder.middle.1.q.weight -> decoder, None, 1, q.weight."""
    found = re.fullmatch(r"(encoder|decoder)\.(?:levels\.(\d+)|middle)\.(\d+)\.(.+)", name)
    return None if found is None else (found[1], found[2], found[3], found[4])


def _part(j: str, tail: str, settings: Mapping[str, Any], side: str, level: str, words: Mapping[str, str]) -> str:
    """What the j-th layer of a level is, and its number among its kind: residual blocks and attentions take turns."""
    if tail in ("weight", "bias"):
        return words["sample"]
    depth = int(level) if side == "encoder" else len(settings["mult"]) - 1 - int(level)
    step = 2 if depth in settings.get("attention", ()) else 1
    return f"{words['attend' if _attends(tail) else 'block']}.{int(j) // step}"


def _attends(tail: str) -> bool:
    return tail.split(".")[0] in ("norm", "q", "k", "v", "out")


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return [int(found[1]) for found in (re.fullmatch(pattern, name) for name in names) if found]


PREFIX = "first_stage_model."
WHITENED = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")  # which read means and deviations by channel
SHIFTED = ("StableDiffusion3", "Flux")  # how pipelines begin that read a shift
UPSCALES, UPSCALER = ("StableDiffusionUpscalePipeline",), 0.08333  # the scale factor that it always takes
FLUX = (0.3611, 0.1159)  # scale factor and shift of the autoencoder that is published in a file of its own


class Autoencoder(protocols.Part):
    """KL and VQ; without a network around them they are a model alone."""

    kind = "autoencoder"
    word = "autoencoder"
    folders = ("vae", "vqvae")
    alone = True
    classes = ("AutoencoderKL", "VQModel")

    def take_file(self, file: File, bundle: Bundle, scale: float) -> None:
        """CompVis' below `first_stage_model.`; one that comes alone has no prefix."""
        alone, inside = bundle.recipe is None, f"{PREFIX}encoder.conv_in.weight" in file.weights
        if alone and any("down_blocks." in name for name in file.weights):
            raise Refusal(f"{file.path} is of diffusers' names; name the folder of its model, where its config.json lies.")
        if alone and "input_blocks.0.0.weight" in file.weights:
            raise Refusal(f"{file.path} is a U-Net alone, without what it is told by (a text tower) and its autoencoder.")
        if alone and not inside and "encoder.conv_in.weight" not in file.weights:
            raise Refusal(
                f"{file.path} is no model in CompVis' or Stability's layout: it begins with {sorted(file.weights)[:3]}. A part, "
                "or one of several pieces, of a model in a folder is read with it: name that folder."
            )
        if not alone and not any(name.startswith(PREFIX) and not name.startswith(LEFT) for name in file.weights):
            return
        prefix = PREFIX if inside or not alone else ""
        config = settings_of(file.below(prefix))
        shapes = autoencoder_shapes(config)
        weights = file.take(compvis(shapes, config), shapes, prefix)
        said, shift = file.scale(scale), file.shift(bundle.shift)
        if alone and not said and not config.get("quant_conv", True):
            scale, shift = FLUX
        scale = said or (1.0 if "codebook" in weights else scale)  # a VQ is published with 1
        part = Part(config, _measured(config, weights, shapes, scale, mean=shift), scale=None if said else scale)
        bundle.parts[self.kind] = part
        if not said:
            known = " (Stable Diffusion 1's and 2's is 0.18215, XL's 0.13025, a VQ's 1, Stable Diffusion 3's 1.5305)"
            bundle.assumed.append(f"scale: {scale:g}{known if alone else ''}")
        if not said and shift:
            bundle.assumed.append(f"shift: {shift:g}{' (Stable Diffusion 3 has 0.0609)' if alone else ''}")

    def give_file(self, bundle: Bundle) -> dict[str, Tensor]:
        """The same; alone, a VQ draws the same whatever its statistics."""
        if self._is_other(bundle):
            return {}
        stage = bundle.parts[self.kind].weights if self._scale(bundle) is not None else folded(bundle.parts[self.kind])
        return give(compvis(stage, bundle.parts[self.kind].settings()), stage, "" if bundle.recipe is None else PREFIX)

    def beside(self, bundle: Bundle) -> dict[str, Any]:
        """Its scale factor, shift and sizes."""
        if self._is_other(bundle):
            return {}
        part, (scale, shift) = bundle.parts[self.kind], self._scale(bundle) or (1.0, 0.0)
        first = _autoencoder_config.beside(part.settings(), "codebook" in part.weights)
        return {"scale_factor": scale, **({"shift_factor": shift} if shift else {}), "first_stage_config": first}

    def take_folder(self, folder: Path, index: Mapping[str, Any], bundle: Bundle) -> None:
        """diffusers' `vae` or `vqvae`; alone, the folder itself."""
        alone = bundle.recipe is None
        place = folder if alone else folder / ("vqvae" if "vqvae" in index else "vae")
        part = read_autoencoder(place, None if alone else index)
        bundle.parts[self.kind] = part
        if part.scale is not None:
            bundle.assumed.append(f"scale: {part.scale}, which AutoencoderKL and VQModel mean where it is not said")

    def give_folder(self, bundle: Bundle, folder: Path, index: Mapping[str, Any]) -> None:
        """The same. A VQ alone draws the same whatever its statistics, which are left where they differ by channel."""
        if self._is_other(bundle):
            return
        part, said = bundle.parts[self.kind], self._scale(bundle)
        place = folder if bundle.recipe is None else folder / ("vqvae" if "vqvae" in index else "vae")
        weights = part.weights if said is not None else folded(part)
        shifted = index.get("_class_name", "").startswith(SHIFTED)
        write_json(vae_config(part.settings(), *(said or (1.0, 0.0)), weights, shifted), place / "config.json")
        save_tensors(give(diffusers(weights, part.settings()), weights), place / "diffusion_pytorch_model.safetensors")

    def take_ours(self, bundle: Bundle, folder: Path) -> None:
        """The folder that the recipe names, or this one."""
        home = folder
        if bundle.recipe is not None:
            node = bundle.recipe["autoencoder"]
            if node.get("_target_") != "ldm.build.load_autoencoder":
                raise Refusal(f"The autoencoder of {folder} is {node.get('_target_')}, which no other layout knows.")
            home = home_of(node["path"], folder)
        config, path = without_usual(read_recipe(home))[0], home / "model.safetensors"
        if config.get("_target_") not in AUTOENCODERS:
            raise Refusal(f"{home} holds {config.get('_target_')}; KL, VQ and RAE autoencoders have a place in other layouts.")
        if config["_target_"] not in TARGETS:
            return
        weights = read_weights(path)
        check_whole(weights, autoencoder_shapes(config), str(path))
        check_numbers(weights, path)
        bundle.parts[self.kind] = Part(dict(config), weights)

    def give_ours(self, bundle: Bundle, folder: Path) -> None:
        """The same."""
        if self.kind in bundle.parts and not self._is_other(bundle):
            part = bundle.parts[self.kind]
            save_model(part.weights, part.config, folder if bundle.recipe is None else folder / self.kind)

    def _is_other(self, bundle: Bundle) -> bool:
        """Whether the autoencoder is one that another file reads and writes."""
        return self.kind in bundle.parts and bundle.parts[self.kind].kind != self.kind

    def _scale(self, bundle: Bundle) -> tuple[float, float] | None:
        """Scale factor and shift; None where another layout has no word for its statistics, and they must be folded in."""
        part = bundle.parts[self.kind]
        said = scale_of(part)
        if said is not None and said[1] and bundle.recipe is not None and not network_of(bundle).shift:
            return None  # pipelines and code of such networks know no shift
        return said or ((1.0, 0.0) if bundle.recipe is None and "codebook" in part.weights else None)


def read_autoencoder(folder: Path, index: Mapping[str, Any] | None = None) -> Part:
    """AutoencoderKL's or VQModel's folder, alone or of the pipeline with the model_index.json `index`.

    Raises:
        Refusal: names what is missing, unknown, or read by nobody.
    """
    config, pipeline = read_config(folder / "config.json"), None if index is None else index["_class_name"]
    if index is not None:
        config["_class_name"] = class_of(index, folder.name) or config.get("_class_name")
    ours = vae_settings(config, folder)
    shapes = autoencoder_shapes(ours)
    weights = take_part(folder, diffusers(shapes, ours), shapes, today=today)
    scale = config.get("scaling_factor", UPSCALER if pipeline in UPSCALES else 0.18215)
    if pipeline in UPSCALES and scale != UPSCALER:
        raise Refusal(f"{folder} has scaling_factor={scale}; {pipeline} takes {UPSCALER}, whatever is said. Write that there.")
    by_channel = {name: config[name] for name in ("latents_mean", "latents_std") if config.get(name) is not None}
    shift = config.get("shift_factor") or 0.0
    strange = by_channel and (len(by_channel) == 1 or shift or pipeline not in (None, *WHITENED))
    if strange or (shift and pipeline and not pipeline.startswith(SHIFTED)):
        raise Refusal(
            f"{folder} says {by_channel or f'shift_factor={shift}'}: latents_mean and latents_std are known, both and without "
            f"shift_factor, in {' and '.join(WHITENED)}; shift_factor in pipelines of {' and '.join(SHIFTED)}; others draw "
            "without. Take them out of its config.json, if it was trained so."
        )
    mean, std = by_channel.get("latents_mean", shift), by_channel.get("latents_std", 1.0)
    weights = _measured(ours, weights, shapes, scale, mean=mean, std=std)
    return Part(ours, weights, scale=None if "scaling_factor" in config else scale)


def _measured(
    config: Mapping[str, Any], weights: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], scale: float, **by_channel: Any
) -> dict[str, Tensor]:
    own = published_statistics(config["channels"], scale, **by_channel)
    if "codebook" in weights:
        own |= {name: weights["codebook"].new_zeros(shapes[name]) for name in ("hits", "sums")}
    return weights | own


PART = Autoencoder()
