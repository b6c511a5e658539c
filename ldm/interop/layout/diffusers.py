"""Folders as diffusers' pipelines write and read them: model_index.json and a sub-folder for each part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_json
from ldm.interop.bundle import BACKBONE, DISCRETE, SHARE, Bundle, recipe_of, usually_named
from ldm.interop.files import take_part
from ldm.interop.find import network_of, networks, parts
from ldm.interop.protocols import Layout, Network
from ldm.interop.schedulers import read_schedule
from ldm.interop.tie import give
from ldm.interop.weights import Config, class_of, read_config

# What is called otherwise since: PixArt's were published when its network was one of a class that DiT's was too.
SINCE = {("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel"}
# Parts that judge or make maps, and change no picture.
BESIDE = {"safety_checker", "feature_extractor", "image_encoder", "depth_estimator", "watermarker", "low_res_scheduler"}


class Diffusers(Layout):
    """A folder with a model_index.json, or with the config.json of one of diffusers' classes."""

    def words(self) -> dict[str, str]:
        """--to diffusers."""
        return {"diffusers": ""}

    def recognise(self, path: Path) -> bool:
        """By its index or config."""
        config = path / "config.json"
        return (path / "model_index.json").is_file() or (config.is_file() and "_class_name" in read_config(config))

    def read(self, path: Path, prediction: str | None) -> tuple[Bundle, str]:
        """See `read_folder`."""
        return read_folder(path), "diffusers"

    def write(self, bundle: Bundle, target: Path) -> None:
        """See `write_folder`."""
        write_folder(usually_named(bundle), target)


def read_folder(folder: Path) -> Bundle:
    """A pipeline's folder, or that of an autoencoder alone.

    Raises:
        Refusal: names what is missing, unknown, or not of this family.
    """
    if not (folder / "model_index.json").is_file():
        bundle, alone = Bundle(None), [part for part in parts() if part.alone]
        kind = read_config(folder / "config.json").get("_class_name")
        next((part for part in alone if kind in part.classes), alone[0]).take_folder(folder, {}, bundle)
        return bundle
    index = read_config(folder / "model_index.json")
    network, config = _network(folder, index)
    network.check_folder(folder)
    built = settings, channels, widths = network.read_config(config)
    shapes, rows = network.shapes(channels, widths, settings), network.diffusers_tables(config, built)
    ties = network.diffusers_ties(shapes, settings) | {name: tie for name, (tie, _) in rows.items()}
    wanted = {**shapes, **{name: shape for name, (_, shape) in rows.items()}}
    left, today = network.diffusers_left, network.today
    taken = take_part(folder / network.folder, ties, wanted, left=left, today=today) | network.computed(settings)
    weights = {name if name in rows else BACKBONE + name: x for name, x in taken.items()}
    schedule, kind, grid, assumed = read_schedule(folder / "scheduler", class_of(index, "scheduler"), index["_class_name"])
    bundle = Bundle({"condition": {}}, weights, grid=grid, assumed=assumed)
    for part in parts():
        part.take_folder(folder, index, bundle)
    network.conditions(bundle, built, config, index)
    level = SHARE if kind == "Flow" else DISCRETE
    bundle.recipe = recipe_of(network.node(settings), bundle.recipe["condition"], kind, schedule, dict(level))
    return network.brought(bundle)


def write_folder(bundle: Bundle, folder: Path) -> None:
    """A folder that the pipeline's `from_pretrained` reads; model_index.json, written last, says that it is whole.

    Raises:
        Refusal: the model has something that no pipeline of diffusers can do; names it.
    """
    if bundle.recipe is None:
        for part in (part for part in parts() if part.alone):
            part.give_folder(bundle, folder, {})
        return
    network = network_of(bundle)
    network.check_diffusers(bundle)
    bundle = network.given(bundle)
    scheduler = network.scheduler(bundle)
    for part in parts():
        part.check_folder(bundle)
    index, settings, backbone = network.pipeline(bundle), network.settings(bundle), bundle.backbone()
    theirs = give(network.diffusers_ties(backbone, settings), backbone) | network.diffusers_rows(bundle)
    write_json(network.config(settings, bundle), folder / network.folder / "config.json")
    save_tensors(theirs, folder / network.folder / "diffusion_pytorch_model.safetensors")
    for part in parts():
        part.give_folder(bundle, folder, index)
    for place, config in network.beside_folder(bundle).items():
        write_json(config, folder / place)
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    write_json(index, folder / "model_index.json")


def _network(folder: Path, index: Mapping[str, Any]) -> tuple[Network, Config]:
    """The network of a pipeline, and its config.

    Raises:
        Refusal: it has none that is known, no autoencoder, or a part that nothing here reads, such as a ControlNet.
    """
    known = [network for network in networks() if network.folder in index]
    kind = index.get("_class_name")
    if not known or not {"vae", "vqvae"} & index.keys():
        raise Refusal(
            f"{folder} is a {kind}; of diffusers' pipelines those with a unet and a vae or vqvae, and DiT's, are known."
        )
    there = {name for name, value in index.items() if isinstance(value, list) and value[:1] not in ([], [None])}
    read = {"scheduler", *(n.folder for n in known), *(place for part in parts() for place in part.folders)}
    if strange := sorted(there - read - BESIDE):
        raise Refusal(f"{folder} is a {kind} with {', '.join(strange)}, which no model here has.")
    config = read_config(folder / known[0].folder / "config.json")
    named = class_of(index, known[0].folder) or config.get("_class_name")
    config["_class_name"] = SINCE.get((named, config.get("norm_type")), named)
    made = next((n for n in known if config["_class_name"] in n.classes), None)
    if made is None and config["_class_name"] is not None:
        classes = ", ".join(name for n in known for name in n.classes)
        raise Refusal(f"{folder} is a {kind} on a {config['_class_name']}; {classes} are known.")
    return made or known[-1], config


LAYOUT = Diffusers()
