"""A command called in this process, as its script would call it."""

import logging
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


def called(main, *words):
    """Runs a command's `main` with words; what it sets for a whole process is as before afterwards, where it stops early too."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ldm", *map(str, words)])
        patch.setattr(sys, "path", sys.path[:])
        try:
            return main()
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            root.handlers[:], root.level = handlers, level
