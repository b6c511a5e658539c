"""Converts weights between layouts:  ldm convert SOURCE TARGET --to ldm|diffusers|compvis|dit"""

from ldm.interop.__main__ import main

__all__ = ["main"]
