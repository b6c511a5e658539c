"""Which model at rest adapters were trained on: where it lies, and what is in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.files.content import digest_of, file_content
from ldm.files.folder import LOCAL, read_recipe, without_usual
from ldm.files.named import named_content


def identity_of(base: Path) -> dict[str, str]:
    """-> `path`; `sha256` of its own weights; `parts`, that of its autoencoder and text towers, as far as they lie in it.

    Raises:
        NotFound: no model is there.
    """
    parts = digest_of(named_content(_parts(without_usual(read_recipe(base))[0]), base))
    return {"path": str(base.absolute()), "sha256": file_content(base / "model.safetensors"), "parts": parts}


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """In what a base is another than it was, empty where in nothing; what earlier versions did not keep is not compared."""
    words = {"sha256": "its model.safetensors", "parts": "its autoencoder or a text tower"}
    others = [name for name in words if name in before and before[name] != now.get(name)]
    return ", ".join(f"{words[name]} (sha256 {before[name][:12]}, now {now.get(name, 'nothing')[:12]})" for name in others)


def _parts(config: Any) -> list[str]:
    if isinstance(config, Mapping):
        return [part for value in config.values() for part in _parts(value)]
    return [config] if isinstance(config, str) and config.removeprefix(LOCAL).startswith("./") else []
