"""A latent model taken apart, in our names: what every foreign layout is read into and written from."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.kl import KL
from ldm.autoencoder.vq import VQ
from ldm.backbone.dit import DiT
from ldm.backbone.unet import UNet
from ldm.errors import NotFound, Refusal
from ldm.files.folder import (
    LOCAL,
    from_parts,
    load_tensors,
    read_model,
    save_model,
    save_tensors,
    with_parts,
    without_usual,
    write_json,
    write_text,
)
from ldm.interop import unet
from ldm.interop.conditions import IDENTITY
from ldm.interop.tie import check_whole
from ldm.interop.weights import Config, check_numbers, read_config
from ldm.nn.layers import identity, mlp
from ldm.tower.clip import blank_text_tower, named_text_tower
from ldm.types import Widths

BACKBONE = "denoiser.backbone."
BACKBONES = {"ldm.backbone.unet.UNet": UNet, "ldm.backbone.dit.DiT": DiT}
AUTOENCODERS = {"ldm.autoencoder.kl.KL": KL, "ldm.autoencoder.vq.VQ": VQ}
WORDS = "condition.bert.vocabulary"  # the sub-folder of the LDM paper's text model's words
CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
DISCRETE = {"_target_": "ldm.denoiser.Timestep", "steps": 1000}  # how published networks are told the noise level
BETAS = {"ScaledLinear": (0.00085, 0.012), "DDPM": (1e-4, 0.02)}  # what the schedules begin and end with unless told
PREDICTIONS = {"epsilon": "Noise", "v_prediction": "Velocity", "sample": "Data"}


@dataclass
class Part:
    """A frozen model: how it is built and its weights. `tower` says that it is a CLIP's text tower, else an autoencoder.

    `scale` is an autoencoder's published scale factor that its source does not say, and that was assumed.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    tower: bool = False
    scale: float | None = None

    def settings(self) -> dict[str, Any]:
        """How the autoencoder is built, the defaults filled in."""
        return filled(AUTOENCODERS[self.config["_target_"]], self.config)


@dataclass
class Bundle:
    """`recipe` builds the model, `weights` are what was trained, `parts` the frozen models by their sub-folder.

    Without a recipe it is an autoencoder alone, parts["autoencoder"]; without that part, a network whose autoencoder comes
    from elsewhere. `grid` is how its source spaces the steps of sampling, where it says so. `words` is the vocab.txt of a BERT.
    `assumed` is what its source does not say and its family has, in words, and `scale` the scale factor of the family's latents.
    `home` is the folder of our layout that it was read from, where its conditions' other files lie.
    """

    recipe: dict[str, Any] | None
    weights: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    grid: str | None = None
    words: str | None = None
    home: Path | None = None
    assumed: list[str] = field(default_factory=list)
    scale: float | None = None

    def backbone(self) -> dict[str, Tensor]:
        """The backbone's weights, by its own names."""
        return {n.removeprefix(BACKBONE): x for n, x in self.weights.items() if n.startswith(BACKBONE)}

    def channels(self) -> int:
        """How many channels the latents that it draws have."""
        backbone, s = self.backbone(), self.settings()
        if not self.is_dit:
            return backbone["out.2.weight"].shape[0]
        return backbone["last.out.weight"].shape[0] // s["patch"] ** 2 // (2 if s["learn_range"] else 1)

    @property
    def is_dit(self) -> bool:
        """Whether the backbone is a DiT, else it is a U-Net."""
        return self.recipe is not None and self.recipe["backbone"]["_target_"] == "ldm.backbone.dit.DiT"

    def settings(self) -> dict[str, Any]:
        """How the backbone is built, the defaults filled in.

        Raises:
            Refusal: it is no network that other layouts know.
        """
        node = self.recipe["backbone"]
        if node["_target_"] not in BACKBONES:
            raise Refusal(f"backbone={node['_target_']} has no place in other layouts; U-Net and DiT have.")
        return {k: v for k, v in filled(BACKBONES[node["_target_"]], node).items() if k != "vector"}


def read_folder(folder: Path) -> Bundle:
    """A model at rest, as training exports it.

    Raises:
        Refusal: it is not one. NotFound: a part of it is not there.
    """
    recipe, weights = read_model(folder)
    recipe = Config(recipe, folder / "config.json")
    if recipe.get("_target_") in AUTOENCODERS:
        return Bundle(None, {}, {"autoencoder": _whole_autoencoder(recipe, weights, folder)})
    if recipe.get("_target_") != "ldm.build.assemble":
        raise Refusal(f"{folder} holds {recipe.get('_target_')}, neither a latent model nor an autoencoder.")
    parts = {"autoencoder": _autoencoder(recipe["autoencoder"], folder)}
    for place, node in towers(recipe["condition"]).items():
        parts[place] = _tower(node, folder)
    check_numbers(weights, folder / "model.safetensors")
    told = recipe["condition"].get("bert", {}).get("vocabulary")
    words = None if told is None else read_words(_home(told, folder))
    bundle = Bundle(recipe, weights, parts, words=words, home=folder)
    _check_network(bundle, folder / "model.safetensors")
    return bundle


def read_words(folder: Path) -> str:
    """BERT's vocab.txt.

    Raises:
        NotFound: it is not there.
    """
    path = folder / "vocab.txt"
    if not path.is_file():
        raise NotFound(f"There is no {path}. BERT's words are in the vocab.txt of google-bert/bert-base-uncased.")
    return path.read_text(encoding="utf-8")


def write_folder(bundle: Bundle, folder: Path) -> None:
    """The same folder again; its last file says that it is whole."""
    recipe = bundle.recipe
    if bundle.home is not None:
        recipe = with_parts(from_parts(recipe, bundle.home), folder)
    if bundle.words is not None:
        write_text(bundle.words, folder / WORDS / "vocab.txt")
    for place, part in bundle.parts.items():
        home = folder if recipe is None else folder / place
        if part.tower:
            write_json({"model_cfg": part.config, "preprocess_cfg": {}}, home / CLIP_FILES[0])
            save_tensors(part.weights, home / CLIP_FILES[1])
        else:
            save_model(part.weights, part.config, home)
    if recipe is not None:
        save_model(bundle.weights, recipe, folder)


def towers(condition: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The text towers' configs by the sub-folder where their weights lie."""
    found = {}
    for name, node in condition.items():
        if node.get("_target_") == "ldm.condition.text.Text":
            found[f"condition.{name}"] = node
        for tower, inner in node.get("towers", {}).items():
            found[f"condition.{name}.towers.{tower}"] = inner
    return found


def filled(made: type, node: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a config's node, and what its class takes for those that it leaves out."""
    usual = {n: p.default for n, p in inspect.signature(made).parameters.items() if p.default is not p.empty}
    return {**usual, **{k: v for k, v in node.items() if k[0] != "_"}}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's weights."""
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def unet_shapes(channels: int, widths: Mapping[str, int], **settings: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of such a U-Net, which is not built in memory."""
    vector = identity if "vector" in settings else mlp
    with torch.device("meta"):
        return shapes_of(UNet(channels, Widths(**widths), **{**settings, "vector": vector}))


def autoencoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of such a KL or VQ autoencoder."""
    with torch.device("meta"):
        return shapes_of(AUTOENCODERS[config["_target_"]](**{k: v for k, v in config.items() if k[0] != "_"}))


def tower_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a text tower of open_clip's model_cfg."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in blank_text_tower(config).state_dict().items() if name != "logit_scale"}


def recipe_of(
    backbone: Mapping[str, Any],
    condition: Mapping[str, Any],
    prediction: str,
    schedule: Mapping[str, Any],
    level: Mapping[str, Any] = DISCRETE,
) -> dict[str, Any]:
    """The recipe of a model of the family, whose autoencoder lies in a sub-folder.

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


def unet_node(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a U-Net."""
    return {"_target_": "ldm.backbone.unet.UNet", "_partial_": True, **settings}


def text_node(place: str, **settings: Any) -> dict[str, Any]:
    """The config of a published text condition whose tower lies in the sub-folder `place`."""
    return {"_target_": "ldm.condition.text.Text", "model": f"{LOCAL}./{place}", "tokenizer": "clip", **settings}


def _autoencoder(node: Mapping[str, Any], folder: Path) -> Part:
    if node.get("_target_") != "ldm.build.load_autoencoder":
        raise Refusal(f"The autoencoder of {folder} is {node.get('_target_')}, which no other layout knows.")
    home = _home(node["path"], folder)
    config, weights = read_model(home)
    if config.get("_target_") not in AUTOENCODERS:
        raise Refusal(f"{home} holds {config.get('_target_')}; KL and VQ autoencoders have a place in other layouts.")
    return _whole_autoencoder(config, weights, home)


def _whole_autoencoder(config: Mapping[str, Any], weights: dict[str, Tensor], home: Path) -> Part:
    config = without_usual(config)[0]
    check_whole(weights, autoencoder_shapes(config), str(home / "model.safetensors"))
    check_numbers(weights, home / "model.safetensors")
    return Part(config, weights)


def _check_network(bundle: Bundle, path: Path) -> None:
    """Raises ValueError where a U-Net's tensors are not those of its config; other backbones are looked at where they go."""
    if bundle.recipe["backbone"]["_target_"] != "ldm.backbone.unet.UNet":
        return
    backbone, settings = bundle.backbone(), bundle.settings()
    ties = unet.compvis(backbone, settings)
    found = unet.settings_of({tie.theirs[0]: tuple(tie.split(backbone[name])[0].shape) for name, tie in ties.items()})
    vector = {"vector": IDENTITY} if "vector.0.weight" not in backbone else {}
    check_whole(backbone, unet_shapes(found["channels"], found["widths"], **settings, **vector), str(path))


def _tower(node: Mapping[str, Any], folder: Path) -> Part:
    if not node["model"].startswith(LOCAL):
        config, weights = named_text_tower(node["model"], node.get("pretrained"))
        return Part(config, weights, tower=True)
    home = _home(node["model"].removeprefix(LOCAL), folder)
    config, weights = read_config(home / CLIP_FILES[0])["model_cfg"], load_tensors(home / CLIP_FILES[1])
    shapes = tower_shapes(config)
    own = {name: x for name, x in weights.items() if name in shapes}  # beside them may lie a picture tower's
    check_whole(own, shapes, str(home / CLIP_FILES[1]))
    check_numbers(own, home / CLIP_FILES[1])
    return Part(config, own, tower=True)


def _home(path: str, folder: Path) -> Path:
    return folder / path[2:] if path.startswith("./") else Path(path)
