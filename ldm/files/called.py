"""How the person called this program, for the commands that it prints."""

import sys
from pathlib import Path

SCRIPTS = ("train.py", "sample.py", "evaluate.py", "precompute.py", "quickstart.py")  # at the top of a clone


def command_line(name: str) -> str:
    """The command `name`, such as train, in the form that this process was called in: a script, the module, or `ldm`."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.parts[-2:] == ("ldm", "__main__.py"):
        return f"python -m ldm {name}"
    in_clone = program.name in SCRIPTS or (program.stem != "ldm" and Path("train.py").is_file() and Path("ldm").is_dir())
    return f"python {name}.py" if in_clone else f"ldm {name}"
