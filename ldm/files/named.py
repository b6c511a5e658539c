"""Hashes of the files that a config names: a model's path, its parts, a weaker model that guides it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.files.content import file_content, files_content
from ldm.files.folder import LOCAL, is_part

CHECKPOINTS = "*.ckpt"


def named_content(config: Any, home: Path = Path()) -> list[str]:
    """A plain config -> sha256, in hex, of every file and model's folder that it names, in its order.

    `./name` is below the folder `home`. Of a folder the files of a model at rest count, or else its checkpoints.
    """
    if isinstance(config, Mapping):
        return [content for value in config.values() for content in named_content(value, home)]
    if isinstance(config, list):
        return [content for value in config for content in named_content(value, home)]
    if not isinstance(config, str) or not config or len(config) > 1000:
        return []
    name = config.removeprefix(LOCAL)
    path = home / name if name.startswith("./") else Path(name)
    if path.is_file():
        return [file_content(path)]
    if not path.is_dir():
        return []
    files = sorted(filter(is_part, path.rglob("*"))) or sorted(file for file in path.rglob(CHECKPOINTS) if file.is_file())
    return [files_content(files, path)] if files else []
