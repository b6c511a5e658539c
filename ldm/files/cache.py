"""Where what was brought from elsewhere is kept: remote shards, indices of what cannot be written beside, published models."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """LDM_CACHE, or ~/.cache/ldm."""
    return Path(os.environ.get("LDM_CACHE", "~/.cache/ldm")).expanduser()
