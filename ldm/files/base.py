"""The base model of adapters: its place, and hashes by which it is known again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.files.content import digest_of, file_content
from ldm.files.folder import LOCAL, read_recipe, without_usual
from ldm.files.named import named_content


def identity_of(base: Path) -> dict[str, str]:
    """-> its absolute `path`, the `sha256` of its model.safetensors, and that of its `parts`, the autoencoder and text towers in
    sub-folders of it.

    Raises:
        NotFound: no model is there.
    """
    parts = digest_of(named_content(_parts(without_usual(read_recipe(base))[0]), base))
    return {"path": str(base.absolute()), "sha256": file_content(base / "model.safetensors"), "parts": parts}


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Two identities of a base -> words about what differs, "" where nothing does; what is not in `before` is not compared."""
    words = {"sha256": "its model.safetensors", "parts": "its autoencoder or a text tower"}
    others = [name for name in words if name in before and before[name] != now.get(name)]
    return ", ".join(f"{words[name]} (sha256 {before[name][:12]}, now {now.get(name, 'nothing')[:12]})" for name in others)


def _parts(config: Any) -> list[str]:
    if isinstance(config, Mapping):
        return [part for value in config.values() for part in _parts(value)]
    return [config] if isinstance(config, str) and config.removeprefix(LOCAL).startswith("./") else []
