"""Adapters in others' files: which kind one is, read and written by the file of that kind in `adapter/`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.interop.bundle import Bundle
from ldm.interop.find import adapter_kinds
from ldm.interop.foreign import Foreign
from ldm.interop.hub import HUB, download
from ldm.interop.protocols import Read


def read_adapter(source: str, name: str | None, recipe: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Read, str]:
    """A source in another layout -> the adapter for a model of that recipe and of those weights; and the source's sha256.

    Raises:
        NotFound: nothing is there. Refusal: it is no adapter that is known, or of another model.
    """
    found = Foreign(download(source) if source.startswith(HUB) else Path(source))
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
