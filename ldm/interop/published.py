"""Published models by a short name, from published.yaml: where each lies, under which licence, and how it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Published:
    """One row of published.yaml, whose head says more.

    Args:
        source: where it lies, `hf://ORG/NAME` or an address.
        licence: under which it stands.
        gated: whether its licence must be accepted there before.
        mirror: another place with the same bytes, or None.
        sha256: of the file, where it is known.
        usual: how it is drawn from.
    """

    source: str
    licence: str
    gated: bool
    mirror: str | None = None
    sha256: str | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)


@cache
def published() -> dict[str, Published]:
    """Every published model by its short name."""
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: Published(**row) for name, row in rows.items()}
