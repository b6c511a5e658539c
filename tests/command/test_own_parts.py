"""Parts of a user's own, in a package outside the tree, as README and docs/own.md have them: their code and their commands."""

import json
import re
import shlex
from importlib import import_module

import pytest

from helpers.command import called
from helpers.runs import write_runs
from ldm.compose import CONFIGS

ROOT = CONFIGS.parent
PAGES = ("README.md", "docs/own.md")
FILE = re.compile(r"`(mine/[\w/]+\.(?:py|yaml))`,?\n\n```\w+\n(.*?)```", re.S)
COMMAND = re.compile(r"^python (\w+)\.py (.*\[mine\](?:.*\\\n)?.*[^.])$", re.M)
SMALL = {  # what is added to a page's commands, for them to take no minutes
    "train": ["trainer.max_steps=1", "trainer.accelerator=cpu", "data.batch=4", "data.workers=0", "logger=[]"],
    "sample": ["sampler.steps=1", "out=samples", "resolution=8"],
    "evaluate": ["sampler.steps=1", "batch=8"],
}


def commands(page):
    return [(name, shlex.split(words.replace("\\\n", ""))) for name, words in COMMAND.findall((ROOT / page).read_text())]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder in which all the pages' files are."""
    home = tmp_path_factory.mktemp("home")
    for page in PAGES:
        for name, text in FILE.findall((ROOT / page).read_text()):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
    return home


@pytest.fixture
def beside(package, tmp_path, monkeypatch, clip_folder, emoji_root):
    """Calls commands in the folder with the package, where runs/quickstart is too; -> a function of a command and its words."""
    if not (package / "runs" / "quickstart").exists():
        write_runs(package / "runs", clip_folder)
    monkeypatch.chdir(package)
    data = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2"]

    def call(name, words):
        more = [] if name == "sample" else data
        more += [f"cache={tmp_path}"] if name == "evaluate" else []
        return called(import_module(f"ldm.command.{name}").main, *words, *SMALL[name], *more)

    return call


def test_readmes_backbone_trains_as_it_is_written(beside, package, capfd):
    """And nothing warns of a search path that is there."""
    (name, words), *_ = commands("README.md")
    beside(name, [*words, "callback=[checkpoint]", "run_id=pixels"])
    assert json.loads((package / "runs/pixels/config.json").read_text())["backbone"]["_target_"] == "mine.backbone.Pixels"
    assert "not available" not in capfd.readouterr().err


def test_ones_own_parts(beside, package, capfd):
    """Trained, asked for when drawing, and measured, by the page's own commands."""
    train, sample, evaluate = commands("docs/own.md")[-3:]
    small = ["callback.counting.every=1", "autoencoder=identity", "backbone=mlp", "backbone.width=8", "data.size=8"]
    beside(train[0], [*train[1], *small])
    assert "4 samples were seen" in capfd.readouterr().out
    beside(*sample)
    asked = json.loads((package / "samples" / "request.json").read_text())["asked"]
    drawn = json.loads((package / "samples" / "request.json").read_text())
    assert [drawn[part]["_target_"] for part in ("sampler", "guidance")] == ["mine.leap.Leap", "mine.fading.Fading"]
    assert asked == {"brightness": [-0.5, 0.5]} and (package / "samples" / "00001.png").is_file()
    beside(evaluate[0], evaluate[1])
    numbers = json.loads((package / "runs/mine/evaluation/metrics.json").read_text())
    assert numbers["colourful"]["value"] > 0
