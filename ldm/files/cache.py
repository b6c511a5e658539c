"""The cache's folder: of remote shards, of indices that cannot be written beside their shards, of published models."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """-> the environment's LDM_CACHE, or ~/.cache/ldm."""
    return Path(os.environ.get("LDM_CACHE", "~/.cache/ldm")).expanduser()
