"""A model at rest: a folder of safetensors and JSON."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import NotFound, NotWritten, Refusal
from ldm.files.moved import moved, moved_names
from ldm.files.weights import load_tensors
from ldm.files.whole import write_whole

FORMAT = 1  # of config.json and of checkpoints; those without a number are of before there was one, and read as 0


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, and what is said beside its tensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, dict(metadata or {}) or None)
        except SafetensorError as error:
            raise NotWritten(str(error)) from error

    write_whole(path, write)


def write_text(text: str, path: Path) -> None:
    """Writes a text file."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(value: Any, path: Path) -> None:
    """Writes a JSON file."""
    write_text(json.dumps(value, indent=2) + "\n", path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        NotFound: nothing is there. Refusal: the file is damaged.
    """
    if not path.is_file():
        raise NotFound(f"There is no {path}; its folder is not whole. Export or copy it again.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise Refusal(f"{path} is not whole JSON ({error}). Export or copy it again.") from error


def save_model(weights: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Writes config.json, then model.safetensors, whose presence says that the folder is complete.

    Raises:
        Refusal: the config has a setting called `format`, which is the file's own, and not its number.
    """
    if config.get("format", FORMAT) not in range(FORMAT + 1):
        raise Refusal(f"format={config['format']}: config.json has this name for itself; give the setting another one.")
    write_json({"format": FORMAT, **{k: v for k, v in config.items() if k != "format"}}, folder / "config.json")
    save_tensors(weights, folder / "model.safetensors")


def read_recipe(folder: Path) -> dict[str, Any]:
    """What config.json says how to build a model, by present names; its parts may be named as `./name` (`from_parts`).

    Raises:
        NotFound: nothing is there. Refusal: it is damaged, no recipe, or of a later format.
    """
    path = folder / "config.json"
    recipe = read_json(path)
    if not isinstance(recipe, dict):
        raise Refusal(f"{path} holds a {type(recipe).__name__}; settings by name were wanted.")
    check_format(recipe.pop("format", 0), path)
    return moved(recipe)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a model of ours, by present names.

    Raises:
        Refusal: the file is cut off or no safetensors.
    """
    return moved_names(load_tensors(path))


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """-> the recipe and the weights of a folder that `save_model` wrote.

    Raises:
        NotFound: one of them is not there. Refusal: one is damaged, or of a later format.
    """
    return read_recipe(folder), read_weights(folder / "model.safetensors")


def present(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A training checkpoint by present names: its recipe, its weights, and what its callbacks keep of them.

    Raises:
        LaterFormat: it is of one that is not known here.
    """
    check_format(checkpoint.get("format", 0), path)
    tensors = {name: moved_names(checkpoint[name]) for name in ("state_dict", "callbacks") if name in checkpoint}
    recipe = {"recipe": moved(checkpoint["recipe"])} if "recipe" in checkpoint else {}
    return {**checkpoint, **tensors, **recipe}


class LaterFormat(Refusal):
    """A file was written by a later version of this framework."""


def check_format(number: Any, path: Path) -> None:
    """Raises LaterFormat if a file is of a format that is not known here."""
    if type(number) is not int or not 0 <= number <= FORMAT:
        raise LaterFormat(
            f"{path} is of format {number!r}, and this version of ldm reads formats up to {FORMAT}. Update ldm, or export the "
            "model with the version that is installed here."
        )


def without_usual(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe as it is kept -> what builds the model, and what it was trained on (data/usual.py), where it says so."""
    return {name: node for name, node in recipe.items() if name != "usual"}, dict(recipe.get("usual") or {})


LOCAL = "local-dir:"


def as_run(folder: Path) -> str:
    """The words of a training command that put its result into `folder`."""
    if folder.parts[:1] == ("runs",) and len(folder.parts) > 1:
        return f"run_id={'/'.join(folder.parts[1:])}"
    return f"runs={folder.parent.parent} run_id={folder.parent.name}/{folder.name}" if folder.parent.name else f"folder={folder}"


PART = (
    "config.json",
    "model.safetensors",
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "statistics.safetensors",
    "statistics.json",
    "vocab.txt",
    "null.safetensors",
    # a language model's, as transformers writes them: its weights, whole or in pieces, and its tokenizer
    "model.*safetensors*",
    "model-*.safetensors",
    "pytorch_model*.bin*",
    "token*",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)


def is_part(path: Path) -> bool:
    """Whether it is a file of a model at rest, by its name."""
    return any(path.match(part) for part in PART) and path.is_file()


def with_parts(config: Any, folder: Path, name: str = "") -> Any:
    """Copies the model folders that a config names into sub-folders of `folder`; -> the config naming those, as `./name`."""
    if isinstance(config, Mapping):
        parts = {k: name if k in ("path", "model") else f"{name}.{k}".strip(".") for k, v in config.items() if not _apart(k, v)}
        return {k: with_parts(v, folder, parts[k]) if k in parts else v for k, v in config.items()}
    source = Path(config.removeprefix(LOCAL)) if isinstance(config, str) else None
    parts = sorted(filter(is_part, source.iterdir())) if source is not None and source.is_dir() else []
    if not parts:
        return config
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    for path in parts:
        write_whole(target / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
    return (LOCAL if config.startswith(LOCAL) else "") + f"./{name}"


def from_parts(config: Any, folder: Path) -> Any:
    """The config with every `./name` made a path below `folder`: the inverse of `with_parts`."""
    if isinstance(config, Mapping):
        return {k: v if _apart(k, v) else from_parts(v, folder) for k, v in config.items()}
    if isinstance(config, str) and config.removeprefix(LOCAL).startswith("./"):
        return (LOCAL if config.startswith(LOCAL) else "") + str(folder / config.removeprefix(LOCAL)[2:])
    return config


def _apart(name: str, value: Any) -> bool:
    """What a recipe names and does not hold: what it was trained on, and a base, by its hash."""
    return name == "usual" or (isinstance(value, Mapping) and "sha256" in value)
