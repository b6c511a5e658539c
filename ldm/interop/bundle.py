"""A latent model taken apart, in our names: what every foreign layout is read into and written from."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.kl import KL
from ldm.autoencoder.rae import RAE
from ldm.autoencoder.vq import VQ
from ldm.errors import Refusal

VERSION = "0.35.0"  # of diffusers, whose configs are written
BACKBONE = "denoiser.backbone."
AUTOENCODERS = {"ldm.autoencoder.kl.KL": KL, "ldm.autoencoder.vq.VQ": VQ, "ldm.autoencoder.rae.RAE": RAE}
DISCRETE = {"_target_": "ldm.denoiser.Timestep", "steps": 1000}  # how published networks are told the noise level
SHARE = {"_target_": "ldm.denoiser.NoiseTime", "steps": 1000}  # and those of straight paths
STRAIGHT = {"_target_": "ldm.schedule.Linear", "floor": 1e-6}  # published ones end at 0
BETAS = {"ScaledLinear": (0.00085, 0.012), "DDPM": (1e-4, 0.02)}  # what the schedules begin and end with unless told
WORDS = "condition.bert.vocabulary"  # where the words of a BERT lie, by its usual name
PREDICTIONS = {"epsilon": "Noise", "v_prediction": "Velocity", "sample": "Data"}


@dataclass
class Part:
    """A frozen model.

    Args:
        config: how it is built.
        weights: by our names.
        kind: the file in `part/` that reads and writes it.
        scale: an autoencoder's published scale factor that its source does not say, and that was assumed.
        files: a tokenizer's, as they are, by name.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    kind: str = "autoencoder"
    scale: float | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """How the autoencoder is built, the defaults filled in."""
        return filled(AUTOENCODERS[self.config["_target_"]], self.config)


@dataclass
class Bundle:
    """A latent model in parts.

    Args:
        recipe: builds the model; None: it is an autoencoder alone, parts["autoencoder"].
        weights: what was trained, by our names.
        parts: the frozen models by their sub-folder; without an autoencoder among them, that comes from elsewhere.
        grid: how its source spaces the steps of sampling, where it says so.
        words: the vocab.txt of a BERT.
        home: the folder of our layout that it was read from, where its conditions' other files lie.
        assumed: what its source does not say and its family has, in words.
        scale, shift: those of the latents of its family.
    """

    recipe: dict[str, Any] | None
    weights: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    grid: str | None = None
    words: str | None = None
    home: Path | None = None
    assumed: list[str] = field(default_factory=list)
    scale: float | None = None
    shift: float = 0.0

    def backbone(self) -> dict[str, Tensor]:
        """The backbone's weights, by its own names."""
        return {n.removeprefix(BACKBONE): x for n, x in self.weights.items() if n.startswith(BACKBONE)}

    def made_by(self, target: str) -> str | None:
        """The name of the condition of a class, if the model has one."""
        if self.recipe is None:
            return None
        return next((name for name, node in self.recipe["condition"].items() if node.get("_target_") == target), None)


USUAL = {"text.Text": "text", "text.Texts": "text", "bert.Bert": "bert", "label.Label": "label", "number.Number": "number"}
USUAL |= {"language.Language": "language", "language.Silence": "language"}
USUAL |= {"inpaint.Inpaint": "inpaint", "depth_map.DepthMap": "depth", "upscale.Upscale": "upscale", "edit.Edit": "edit"}


def usually_named(bundle: Bundle) -> Bundle:
    """The same model; its conditions are called as published ones are, whatever the user called them."""
    condition = bundle.recipe["condition"] if bundle.recipe is not None else {}
    names = {n: USUAL.get(node["_target_"].removeprefix("ldm.condition."), n) for n, node in condition.items()}
    if all(n == usual for n, usual in names.items()) or len(set(names.values())) < len(names):
        return bundle

    def renamed(place: str, before: str) -> str:
        name, dot, rest = place.removeprefix(before).partition(".")
        return f"{before}{names.get(name, name)}{dot}{rest}" if place.startswith(before) else place

    recipe = {**bundle.recipe, "condition": {names[n]: node for n, node in condition.items()}}
    weights = {renamed(n, "conditioner.embedders."): x for n, x in bundle.weights.items()}
    parts = {renamed(place, "condition."): part for place, part in bundle.parts.items()}
    return replace(bundle, recipe=recipe, weights=weights, parts=parts)


def home_of(path: str, folder: Path) -> Path:
    """Where a part lies that a recipe in `folder` names."""
    return folder / path[2:] if path.startswith("./") else Path(path)


def filled(made: type, node: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a config's node, and what its class takes for those that it leaves out."""
    usual = {n: p.default for n, p in inspect.signature(made).parameters.items() if p.default is not p.empty}
    return {**usual, **{k: v for k, v in node.items() if k[0] != "_"}}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's weights."""
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def autoencoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of such a KL or VQ autoencoder."""
    with torch.device("meta"):
        return shapes_of(AUTOENCODERS[config["_target_"]](**{k: v for k, v in config.items() if k[0] != "_"}))


def recipe_of(
    backbone: Mapping[str, Any],
    condition: Mapping[str, Any],
    prediction: str,
    schedule: Mapping[str, Any],
    level: Mapping[str, Any] = DISCRETE,
) -> dict[str, Any]:
    """The recipe of a model of the family, whose autoencoder lies in a sub-folder.

    Args:
        backbone, condition: their nodes; conditions by name.
        prediction: the class in prediction.py.
        schedule, level: their nodes.

    Raises:
        Refusal: it says noise where the schedule leaves no signal, so that no picture could be read from what it says.
    """
    if prediction == "Noise" and schedule.get("zero_terminal_snr"):
        raise Refusal(
            "It says noise (epsilon) on a schedule with zero terminal SNR (rescale_betas_zero_snr, ztsnr): no signal is left in "
            "the last step, and nothing can be drawn from noise alone (2305.08891). Its marks are wrong: models of that schedule "
            "say velocity (v_prediction, --prediction velocity), and others are not of that schedule."
        )
    return {
        "_target_": "ldm.build.assemble",
        "autoencoder": {"_target_": "ldm.build.load_autoencoder", "path": "./autoencoder"},
        "condition": dict(condition),
        "backbone": dict(backbone),
        "schedule": dict(schedule),
        "prediction": {"_target_": f"ldm.prediction.{prediction}"},
        "level": dict(level),
        "unit_input": False,
    }
