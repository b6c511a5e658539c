"""Every command that README, the docs and the recipes print composes as it stands: names, choices and types."""

import re
import shlex

import pytest

from ldm.compose import CONFIGS, check_overrides, compose_config, prepared
from ldm.report.sweep import settings

ROOT = CONFIGS.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
CONFIG_FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if re.search(r"^# .*python \w+\.py ", path.read_text(), re.M))
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`\n]+)`", re.M | re.S)
COMMAND = re.compile(
    r"(?:(?:python |torchrun .*)(train|sample|evaluate|precompute)\.py|\bldm (train|sample|evaluate|precompute)) (.+)"
)


def commands(text):
    """The commands in some lines, each with its words; without a line's comment, and the `...` that stands for more."""
    for line in re.sub(r"\\\n\s*", "", text).replace(" && ", "\n").splitlines():
        if found := COMMAND.search(line):
            words = [word for word in shlex.split(found[3], comments=True) if not word.endswith("...")]
            yield found[1] or found[2], words


def of_page(page):
    return [one for code in CODE.findall((ROOT / page).read_text()) for one in commands(code[0] or code[1])]


def of_config(path):
    """In a config's first lines; what is told of a command follows three spaces."""
    lines = [line.split("   ")[0] for line in path.read_text().splitlines() if line.startswith("#")]
    return list(commands("\n".join(lines)))


def check(command, words):
    """Composes one, of a sweep of evaluate.py the first setting; those of one's own package and of a sweeper that is
    installed apart are run in test_own_parts and test_train."""
    if "--help" in words or any("[mine]" in word or word.startswith("hydra/sweeper=") for word in words):
        return
    swept = [setting for word in words if word.startswith("sweep=") for setting in settings(word.removeprefix("sweep="))[0]]
    words = [*(word for word in words if not word.startswith("sweep=")), *swept]
    if "-m" in words:
        check_overrides(command, prepared([word for word in words if word != "-m"], command), multirun=True)
    else:
        compose_config(command, words)


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_compose(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = of_page(page)
    for command, words in found:
        check(command, words)
    assert len(found) >= {"README.md": 20, "docs/conditioning.md": 10, "docs/evaluation.md": 10}.get(page, 0)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_configs_commands_compose(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert of_config(path)
    for command, words in of_config(path):
        check(command, words)
