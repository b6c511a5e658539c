"""Single files, as CompVis, Stability and facebookresearch publish them: a network and its parts behind their prefixes, or alone.

Beside FILE may lie FILE's .yaml, as the original code wants it: what the weights do not show is taken from it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_text
from ldm.files.weights import metadata_of
from ldm.interop.bundle import BACKBONE, BETAS, Bundle, recipe_of, usually_named
from ldm.interop.conditions import LABEL, with_null, without_null
from ldm.interop.find import network_of, networks, parts, recognised
from ldm.interop.protocols import Layout, Network
from ldm.interop.source import PREDICTIONS, File, told_beside
from ldm.interop.tie import give
from ldm.interop.weights import check_kinds, check_numbers, open_weights

FIRST_STAGE = "encoder.conv_in.weight"  # by which an autoencoder is known
WRAP = "model.diffusion_model."  # what ComfyUI writes before any network's names
SCALE = 0.18215  # of an autoencoder that comes alone and does not say it


class SingleFile(Layout):
    """A file of tensors by name, called after the code that reads a network's."""

    file = True

    def words(self) -> dict[str, str]:
        """--to compvis, dit."""
        return {network.single: network.name for network in networks()}

    def recognise(self, path: Path) -> bool:
        """A file."""
        return path.is_file()

    def read(self, path: Path, prediction: str | None) -> tuple[Bundle, str]:
        """See `read_file`."""
        return read_file(path, open_weights(path), prediction)

    def write(self, bundle: Bundle, target: Path) -> None:
        """See `write_file`."""
        write_file(usually_named(bundle), target)


def read_file(path: Path, weights: Mapping[str, Tensor], prediction: str | None = None) -> tuple[Bundle, str]:
    """A single file's tensors -> the model apart, and the layout's word. `prediction` is what the caller says that it says.

    Raises:
        Refusal: names what is missing, unknown, or undecided.
    """
    weights = unwrapped(weights)
    check_kinds(weights, path)
    file, network = File(path, weights, told_beside(path), metadata_of(path)), recognised(weights)
    if network is None:
        bundle = Bundle(None)
        for part in (part for part in parts() if part.alone):
            part.take_file(file, bundle, SCALE)
        file.check_left()
    else:
        bundle = _read_model(file, network, prediction)
    for place in (bundle.weights, *(p.weights for p in bundle.parts.values())):
        check_numbers(place, path)
    return bundle, "compvis" if network is None else network.single


def unwrapped(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors without first pieces that all names share, such as `net.`, where a model begins behind them.

    Raises:
        Refusal: other programs' file of a network that is published alone, and of what it is told by.
    """
    below = {name.removeprefix(WRAP): x for name, x in weights.items() if name.startswith(WRAP)}
    if (network := recognised(below)) is not None and network.alone:
        if beside := next((name for name in weights if not name.startswith(WRAP)), None):
            raise Refusal(
                f"It holds a {network.name} and more, such as {beside}: name the {network.name}'s own file, or its folder."
            )
        return below
    inner = weights
    while recognised(inner) is None and not inner.keys() & {f"{before}{FIRST_STAGE}" for before in ("", "first_stage_model.")}:
        if len({name.partition(".")[0] for name in inner}) != 1 or not all("." in name for name in inner):
            return weights
        inner = {name.partition(".")[2]: x for name, x in inner.items()}
    return inner


def _read_model(file: File, network: Network, prediction: str | None) -> Bundle:
    file.check_prediction(prediction)
    trained, file.weights = file.weights, network.averaged(file.weights)
    averages = sum(file.weights[name] is not x for name, x in trained.items())
    if averages and averages != (wanted := len(file.below(network.prefix))):
        raise Refusal(f"{file.path} holds averages (model_ema) of {averages} tensors of the {network.name}'s {wanted}.")
    built = settings, channels, widths = network.settings_of(file.below(network.prefix), file.told)
    scale = file.scale(network.scale(file)) or network.scale(file)
    bundle = Bundle({"condition": {}}, scale=scale, shift=network.shift)
    bundle.assumed += [f"weights: {averages} averages (model_ema) in the place of those that were trained"] if averages else []
    bundle.assumed += file.unread()
    for part in () if network.alone else parts():
        part.take_file(file, bundle, bundle.scale)
    for ours, theirs in network.tables().items():
        if theirs in file.weights:
            bundle.weights[ours] = with_null(file.weights[theirs]) if ours == LABEL else file.weights[theirs]
            file.used.add(theirs)
    network.conditions(bundle, built, None, {})
    kind = network.says(file, bundle, built, prediction)
    shapes = network.shapes(channels, widths, settings)
    taken = network.computed(settings) | file.take(network.single_ties(shapes, settings, kind), shapes, network.prefix)
    bundle.weights |= {BACKBONE + name: x for name, x in taken.items()}
    file.check_left(network.left)
    schedule, level = network.schedule(file, kind)
    bundle.recipe = recipe_of(network.node(settings), bundle.recipe["condition"], kind, schedule, level)
    bundle.assumed += network.assumed(file, bundle, prediction)
    if "autoencoder" not in bundle.parts and not network.alone:
        bundle.assumed.append(f"scale: {bundle.scale}, where its autoencoder does not say it")
    return network.brought(bundle)


def write_file(bundle: Bundle, path: Path) -> None:
    """FILE.safetensors and, but for networks alone, FILE.yaml.

    Raises:
        Refusal: the model has something that the layout has no place for.
    """
    if bundle.recipe is None:
        save_tensors({n: x for part in parts() if part.alone for n, x in part.give_file(bundle).items()}, path)
        return
    network = network_of(bundle)
    network.check_single(bundle)
    bundle = network.given(bundle)
    settings, backbone, tables = network.settings(bundle), bundle.backbone(), network.tables()
    there = () if network.alone else parts()
    theirs = {name: x for part in there for name, x in part.give_file(bundle).items()}
    kind = bundle.recipe["prediction"]["_target_"].split(".")[-1]
    theirs |= give(network.single_ties(backbone, settings, kind), backbone, network.prefix)
    theirs |= {name: bundle.weights[ours] for ours, name in tables.items() if ours in bundle.weights}
    theirs |= {tables[LABEL]: without_null(bundle.weights[LABEL])} if LABEL in tables and LABEL in bundle.weights else {}
    known = (BACKBONE, *(prefix for part in there if (prefix := part.prefix(bundle)) is not None))
    if strange := [n for n in bundle.weights if not n.startswith(known) and n not in tables]:
        raise Refusal(f"The layout of {network.single} has no place for {', '.join(strange[:3])}. Use --to ldm.")
    told = None if network.alone else yaml.safe_dump(_told(bundle, network, settings), sort_keys=False)
    save_tensors(theirs, path)
    if told is not None:
        write_text(told, path.with_suffix(".yaml"))


def _told(bundle: Bundle, network: Network, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The yaml that the original code, and reading again, take the settings from.

    Raises:
        Refusal: the schedule or the prediction has no place there.
    """
    recipe = bundle.recipe
    if network.straight:
        params = {**network.beside(settings, bundle), **{k: v for part in parts() for k, v in part.beside(bundle).items()}}
        return {"model": {"params": params}}
    kind, schedule = (recipe[name]["_target_"].split(".")[-1] for name in ("prediction", "schedule"))
    words = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if kind not in words or schedule != "ScaledLinear" or recipe["schedule"].get("zero_terminal_snr"):
        raise Refusal(
            f"CompVis' code knows schedule=scaled_linear without zero_terminal_snr, and prediction=noise, velocity or data; this "
            f"model has {recipe['schedule']} and {kind}. Use --to diffusers, or --to ldm."
        )
    start, end = BETAS["ScaledLinear"]
    params: dict[str, Any] = {
        "parameterization": words[kind],
        "linear_start": recipe["schedule"].get("beta_start", start),
        "linear_end": recipe["schedule"].get("beta_end", end),
        "timesteps": 1000,
    }
    params |= network.beside(settings, bundle)
    for part in parts():
        params |= part.beside(bundle)
    return {"model": {"params": params}}


LAYOUT = SingleFile()
