"""Lists what can be chosen:  ldm list [GROUP]   such as experiment, sampler, metric, objective/time"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ldm.check import nearest
from ldm.compose import CONFIGS


def main() -> None:
    """Prints the groups, or a group's choices, each with the first comment line of its file."""
    parser = argparse.ArgumentParser(prog="ldm list", description=__doc__.splitlines()[0])
    parser.add_argument("group", nargs="?", help="a config group; without it the groups are listed")
    group = parser.parse_args().group
    groups = sorted({str(path.parent.relative_to(root)) for root in roots() for path in root.rglob("*.yaml")} - {"."})
    if group is None:
        print("\n".join(groups))
        return
    rows = dict(choices(group))
    if not rows:
        sys.exit(f"error: there is no group `{group}`.{nearest(group, groups)}")
    width = max(map(len, rows)) + 2
    print("\n".join(f"{name:{width}s}{purpose}".rstrip() for name, purpose in sorted(rows.items())))


def roots() -> list[Path]:
    """Where configs lie: ours, and the folder `configs` where the command is called, if there is one."""
    own = Path("configs").resolve()
    return [CONFIGS] if own == CONFIGS or not own.is_dir() else [CONFIGS, own]


def choices(group: str) -> Iterator[tuple[str, str]]:
    """-> each choice of a group, and those of the folders in it, with its file's first comment line."""
    for root in roots():
        for path in sorted((root / group).rglob("*.yaml")):
            comments = (line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
            purpose = next((line for line in comments if not line.startswith("@package")), "")
            yield path.relative_to(root / group).with_suffix("").as_posix(), purpose
