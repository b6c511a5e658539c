"""Lists what can be chosen:  ldm list [GROUP]   such as experiment, sampler, metric, objective/time; or model, published ones"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from ldm.check import nearest
from ldm.compose import CONFIGS
from ldm.files.table import lines, seen, show

COMMAND = re.compile(r"(?:^|  )(?:python|torchrun|ldm) ")
MODEL = "model"  # no group of configs: what model= takes by a short name
INNER = ("hydra/help", "size/")  # groups that nobody chooses from
FEW = 6  # choices shown of each group


def main() -> None:
    """Prints the groups, or a group's choices, each with the sentence that opens its file."""
    parser = argparse.ArgumentParser(prog="ldm list", description=__doc__.splitlines()[0])
    parser.add_argument("group", nargs="?", help="a config group; without it the groups are listed")
    group = parser.parse_args().group
    if group is None:
        return show(["group", "choices"], [(name, few(name)) for name in groups()]) if seen() else lines(groups())
    rows = listed(group)
    if not rows:
        sys.exit(f"error: there is no group `{group}`.{nearest(group, groups())}")
    show([group, "what it is"], sorted(rows.items()))


def groups() -> list[str]:
    """What can be listed: config groups, and published models."""
    folders = {path.parent.relative_to(root).as_posix() for root in roots() for path in root.rglob("*.yaml")}
    return [*sorted(name for name in folders - {"."} if not name.startswith(INNER)), MODEL]


def listed(group: str) -> dict[str, str]:
    """-> what can be chosen in a group, each with what it is."""
    return dict(models() if group == MODEL else choices(group))


def few(group: str) -> str:
    """-> a group's first choices, and how many more there are."""
    names = sorted(name for name in listed(group) if "/" not in name)
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def models() -> Iterator[tuple[str, str]]:
    """-> each published model's short name, with where it lies and its licence."""
    from ldm.interop.published import published

    for name, row in published().items():
        yield name, f"{row.source}   licence: {row.licence}{', gated: wants HF_TOKEN' if row.gated else ''}"


def roots() -> list[Path]:
    """Where configs lie: ours, and the folder `configs` where the command is called, if there is one."""
    local = Path("configs").resolve()
    return [CONFIGS] if local == CONFIGS or not local.is_dir() else [CONFIGS, local]


def choices(group: str) -> Iterator[tuple[str, str]]:
    """-> each choice of a group, and those of the folders in it, with what it is for."""
    for root in roots():
        for path in sorted((root / group).rglob("*.yaml")):
            yield path.relative_to(root / group).with_suffix("").as_posix(), purpose(path.read_text(encoding="utf-8"))


def purpose(text: str) -> str:
    """What opens a config, or else the docstring of what its own `_target_` names, which is not imported."""
    comments = [line for line in text.splitlines() if not line.startswith("# @package")]
    first = next((i for i, line in enumerate(comments) if line.startswith("# ")), None)
    if first is not None:
        opening = takewhile(lambda line: line.startswith("# "), comments[first:])
        return sentence([line.removeprefix("# ") for line in opening])
    target = re.search(r"^(?:\w+:\n  )?_target_: *ldm\.([\w.]+)\.(\w+)", text, re.MULTILINE)
    file = Path(__file__).parent.parent.joinpath(*target[1].split(".")).with_suffix(".py") if target else None
    if file is None or not file.is_file():
        return ""
    module = ast.parse(file.read_text(encoding="utf-8"))
    made = [node for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == target[2]]
    said = next((said for said in map(ast.get_docstring, [*made, module]) if said), "")
    return sentence(said.split("\n\n")[0].splitlines())


def sentence(lines: Sequence[str]) -> str:
    """The first of some lines, or where its sentence goes on in the next ones, that sentence; a command ends one."""
    said = lines[0] if lines else ""
    if said.endswith(".") or COMMAND.search(said):
        return said
    whole = " ".join(takewhile(lambda line: not COMMAND.match(line), lines))
    return re.match(r".*?\.(?= |$)|.*", whole)[0]
