"""The commands, each a module. They run on Linux, and perhaps on macOS; docs/systems.md."""

import sys

if sys.platform == "win32":
    sys.exit("error: this is Windows, which has no signals to save a run by, and other rules for files; run it in WSL2.")
