"""LoRA files, written."""

from pathlib import Path

from ldm.errors import Refusal
from ldm.interop.bundle import Bundle
from ldm.interop.protocols import Read


def write(adapter: Read, bundle: Bundle, target: Path, layout: str) -> None:
    """Ours -> kohya's file, or diffusers'."""
    raise Refusal(f"--to {layout} is not known for a LoRA.")
