"""Adapters in others' files: which kind one is, read and written by the file of that kind in `adapter/`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.adapt import ADAPTED, TEXT, Asked
from ldm.adapter.lora import LoRA
from ldm.errors import Refusal
from ldm.files.base import identity_of
from ldm.files.folder import read_model, read_recipe, save_model
from ldm.interop.bundle import Bundle
from ldm.interop.find import adapter_kinds
from ldm.interop.foreign import Foreign
from ldm.interop.hub import HUB, here
from ldm.interop.protocols import AdapterKind, Read


def read_adapter(source: str, name: str | None, recipe: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Read, str]:
    """A source in another layout -> the adapter for a model of that recipe and of those weights; and the source's sha256.

    Raises:
        NotFound: nothing is there. Refusal: it is no adapter that is known, or of another model.
    """
    found = Foreign(here(source), source if source.startswith(HUB) else None)
    kind = next((kind for kind in adapter_kinds() if kind.recognise(found)), None)
    if kind is None:
        raise Refusal(f"adapters={source} {_instead(found)}")
    if name is not None and not kind.named:
        raise Refusal(f"adapters={name}={source}: {kind.word} has no name; name it without {name}=.")
    return kind.read(found, Bundle(dict(recipe), dict(weights)), name), found.sha256()


def _instead(found: Foreign) -> str:
    """What a source is that is no adapter."""
    names = list(found.weights)
    kinds = ", ".join(kind.word for kind in adapter_kinds())
    held = f"holds {len(names)} tensors that are of no adapter, such as {names[0]}"
    return f"{held}; known are: {kinds}. A whole model is drawn from by model=..."


def is_adapter(source: str) -> bool:
    """Whether a source is an adapter, of a run here or in another layout."""
    path = here(source)
    if _is_ours(path):
        return True
    if not path.exists() or (path.is_dir() and (path / "model_index.json").is_file()):
        return False
    try:
        found = Foreign(path)
        return any(kind.recognise(found) for kind in adapter_kinds())
    except Refusal:
        return False


def base_of(source: str) -> str | None:
    """The folder of the base that a run of adapters names; None of others' files."""
    path = here(source)
    return str(read_recipe(path)["base"]["path"]) if _is_ours(path) else None


def read_any(source: str, bundle: Bundle) -> Read:
    """As `read_all`, of one adapter.

    Raises:
        Refusal: there are several.
    """
    found = read_all(source, bundle)
    if len(found) > 1:
        raise Refusal(f"{source} holds {', '.join(found)}, and one adapter was wanted; draw with it here.")
    return next(iter(found.values()))


def read_all(source: str, bundle: Bundle) -> dict[str, Read]:
    """The adapters of a run here, or the one in another layout, for a model whose tensors are whole (`with_towers`), by name.

    Raises:
        NotFound: nothing is there. Refusal: it is no adapter, or of another model.
    """
    if not _is_ours(path := here(source)):
        read = read_adapter(source, None, bundle.recipe, bundle.weights)[0]
        return {_member(read): read}
    recipe, tensors = read_model(path)
    if len(recipe["adapters"]) == 1:
        return {name: Read(node, tensors) for name, node in recipe["adapters"].items()}
    kinds = {name: _kind(node) for name, node in recipe["adapters"].items()}
    return {
        name: Read(node, {n: x for n, x in tensors.items() if kinds[name].owns(n)}) for name, node in recipe["adapters"].items()
    }


def write_adapters(source: str, adapters: Mapping[str, Read], bundle: Bundle, base: str, target: Path, layout: str) -> None:
    """Adapters into a layout of theirs, of several into a folder; or, for `ldm`, into a folder like a run's.

    Args:
        source: where they are from, for errors.
        adapters: by name, as they were read.
        bundle: the model that they are of.
        base: where that lies, for a run's folder.
        target: file or folder that is written.
        layout: `ldm`, or one that the kind of adapter has.

    Raises:
        Refusal: the layout has no place for one.
    """
    if layout == "ldm":
        nodes = {name: read.node for name, read in adapters.items()}
        tensors = {n: x for read in adapters.values() for n, x in read.tensors.items()}
        save_model(tensors, {"_target_": ADAPTED, "base": identity_of(Path(base)), "adapters": nodes}, target)
        return
    kinds = {name: _kind(read.node) for name, read in adapters.items()}
    for kind in kinds.values():
        if layout not in kind.layouts:
            others = f"; it is with {', '.join(adapters)} in one run: --to diffusers writes them all" if len(adapters) > 1 else ""
            raise Refusal(f"--to {layout}: {source} is {kind.word}, which goes into {', '.join((*kind.layouts, 'ldm'))}{others}.")
    for name, kind in kinds.items():
        kind.write(adapters[name], bundle, target / kind.file if len(adapters) > 1 else target, layout)


def _kind(node: Mapping[str, Any]) -> AdapterKind:
    """Which kind of adapter a recipe's node is."""
    return next(kind for kind in adapter_kinds() if node["_target_"].split(".")[-2] == kind.adapter)


def _member(read: Read) -> str:
    return read.node["_target_"].split(".")[-2]


def with_towers(bundle: Bundle) -> Bundle:
    """The same model with its text towers' tensors among the others, by the names that they have in the model."""
    towers = {_place(place): part for place, part in bundle.parts.items() if part.kind == "clip"}
    weights = {f"{prefix}{name}": x for prefix, part in towers.items() for name, x in part.weights.items()}
    return replace(bundle, weights=bundle.weights | weights)


def merge(bundle: Bundle, sources: Sequence[Asked]) -> None:
    """Adds LoRAs to a model's weights, and to its towers', in place.

    Raises:
        Refusal: one is no LoRA, or of another model.
    """
    base = with_towers(bundle)
    present = dict(base.weights)
    for one in sources:
        read = read_any(one.source, base)
        if not read.node["_target_"].endswith(".LoRA"):
            raise Refusal(f"--adapters {one.source}: LoRAs alone can be merged into a model's weights.")
        lora = LoRA(**{k: v for k, v in read.node.items() if k[0] != "_"})
        for text, strength in ((False, one.strength), (True, one.strength if one.text is None else one.text)):
            tensors = {n: x for n, x in read.tensors.items() if n.startswith(TEXT) is text}
            present |= lora.merged(tensors, strength, base.weights, present)
    bundle.weights = {name: present[name] for name in bundle.weights}
    for place, part in bundle.parts.items():
        if part.kind == "clip":
            part.weights = {name: present[f"{_place(place)}{name}"] for name in part.weights}


def _place(part: str) -> str:
    """condition.text -> where its tower's tensors begin in a model."""
    return f"conditioner.embedders.{part.removeprefix('condition.')}.tower."


def _is_ours(path: Path) -> bool:
    """Whether there is an exported run of adapters."""
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file() and _target(path) == ADAPTED


def _target(path: Path) -> str | None:
    try:
        return read_recipe(path).get("_target_")
    except Refusal:
        return None
