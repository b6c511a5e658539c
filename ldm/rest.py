"""Models at rest: whatever `model=` takes, found and read."""

from pathlib import Path
from typing import Any

from ldm.check import nearest
from ldm.errors import NotFound
from ldm.files.content import file_content
from ldm.files.folder import LaterFormat, from_parts, read_json, read_model, read_recipe
from ldm.training.protocols import averages_in
from ldm.training.saved import newest, read_checkpoint


def at_rest(source: str | Path) -> Path:
    """What `model=` takes -> a run, an exported folder or a checkpoint of ours.

    These are themselves. A folder of diffusers', a single file, hf://org/name or a short name (`ldm list model`) is brought into
    our layout, once (interop/cache.py).

    Raises:
        NotFound: it is neither, and there is no such file or folder.
    """
    from ldm.interop.cache import brought, is_foreign, is_named
    from ldm.interop.published import published

    path = Path(source)
    if path.exists():
        inside = path.name == "model.safetensors" and (path.parent / "config.json").is_file() and not is_foreign(path.parent)
        if inside or not is_foreign(path) or (path.suffix == ".ckpt" and is_own(path)):
            return path.parent if inside else path
    elif not is_named(str(source)):
        word = str(source)
        close = nearest(word, list(published())) if "/" not in word else ""
        raise NotFound(
            f"There is no model in {word}: neither model.safetensors nor a good *.ckpt, nor is it hf://ORG/NAME or a published "
            f"model's short name.{close}"
        )
    return brought(str(source))


def in_our_layout(source: str) -> str:
    """What is there, or has a name elsewhere, in our layout; anything else as it is written."""
    from ldm.interop.cache import is_named

    return str(at_rest(source)) if Path(source).exists() or is_named(source) else source


def is_own(path: Path) -> bool:
    """Whether a .ckpt is of a training here, and not one of another framework."""
    try:
        return "recipe" in read_checkpoint(path)
    except LaterFormat:
        return True
    except (ValueError, FileNotFoundError):
        return False


def holds_ours(path: Path) -> bool:
    """Whether there is a run, an exported model or a checkpoint of ours."""
    if path.is_file():
        return path.suffix == ".ckpt" and is_own(path)
    config = path / "config.json"
    return newest(path) is not None or (config.is_file() and "_target_" in (read_json(config) or {}))


def recipe_of(path: str | Path) -> dict[str, Any]:
    """What a model, whatever `at_rest` takes, or a run's newest checkpoint, says of itself, as it is kept.

    Raises:
        NotFound: nothing is there.
    """
    path = at_rest(path)
    if (path / "model.safetensors").is_file():
        return read_recipe(path)
    return dict(read_checkpoint(_newest(path), lazily=True)["recipe"])


def read_at_rest(source: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe and the weights of whatever `at_rest` takes, of a run those of its newest checkpoint."""
    path = at_rest(source)
    if (path / "model.safetensors").is_file():
        recipe, weights = read_model(path)
        return from_parts(recipe, path), weights
    return from_checkpoint(path)


def from_checkpoint(path: Path, part: str = "model") -> tuple[dict, dict]:
    """The recipe and the weights of a stage's `part`, averaged where the checkpoint has averages."""
    checkpoint, prefix = read_checkpoint(_newest(path)), f"{part}."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    weights |= {k.removeprefix(prefix): v for k, v in averages_in(checkpoint).items() if k.startswith(prefix)}
    return checkpoint["recipe"], weights


def autoencoder_of(source: str | Path) -> Path:
    """What `model=` takes -> the folder of its autoencoder: its own, or the one in it."""
    folder = at_rest(source)
    inside = folder / "autoencoder"
    return inside if (inside / "model.safetensors").is_file() and (inside / "config.json").is_file() else folder


def content_of(path: Path) -> str:
    """sha256 of what adapters are read from."""
    exported = path / "model.safetensors"
    return file_content(exported if exported.is_file() else _newest(path))


def _newest(path: Path) -> Path:
    checkpoint = newest(path) if path.is_dir() else path
    if checkpoint is None or not checkpoint.is_file():
        raise NotFound(f"There is no model in {path}: neither model.safetensors nor a good *.ckpt. Name a run with model=FOLDER.")
    return checkpoint
