"""metrics.json, which an evaluation writes: number -> its value, standard error, note, what was measured, and the protocol."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import NotFound, Refusal
from ldm.files.folder import write_json

NAME = "metrics.json"


def write_metrics(entries: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Writes FOLDER/metrics.json."""
    write_json(dict(entries), folder / NAME)


def read_metrics(place: str | Path) -> dict[str, dict[str, Any]]:
    """The folder of an evaluation, or its metrics.json -> the entries by number.

    Raises:
        NotFound: it is not there. Refusal: it is no JSON, or has numbers without their protocol.
    """
    path = Path(place) / NAME if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise NotFound(f"{place}: there is no {NAME}; name the OUT folder of an evaluation.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(f"{path} is damaged ({error}). Evaluate again, or remove it.") from error
    whole = isinstance(entries, dict) and all(isinstance(e, dict) and {"value", "protocol"} <= e.keys() for e in entries.values())
    if not whole:
        raise Refusal(f"{path} has numbers without their protocol, and what has none compares with nothing.")
    return entries


def shown(entry: Mapping[str, Any]) -> str:
    """-> an entry's number with its standard error, as text."""
    return f"{entry['value']:.4g}" + ("" if entry.get("error") is None else f" ± {entry['error']:.2g}")
