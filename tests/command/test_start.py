"""What a command imports before it answers: modules are counted here, seconds in benchmarks/start.py."""

import os
import subprocess
import sys

import pytest

from helpers.runs import write_runs
from ldm.build import build_stage
from ldm.compose import CONFIGS, compose_config

TINY = ["condition=[]", "autoencoder=identity", "backbone=mlp", "backbone.size=8", "backbone.width=8"]
SCRIPT = """
import sys
from contextlib import suppress
from importlib import import_module
from helpers.command import called

def say(name):
    print("after", name, sorted({"torch", "torchvision", "numpy", "pytorch_lightning", "open_clip"} & set(sys.modules)))

runs, data, tiny = sys.argv[1], sys.argv[2:5], sys.argv[5:]
import ldm.command.quickstart
print("after the quickstart's import", sorted({"torch", "tqdm"} & set(sys.modules)))
for name in ("train", "sample", "evaluate", "precompute"):
    with suppress(SystemExit):
        called(import_module(f"ldm.command.{name}").main, "--help")
    say(f"{name} --help")
from ldm.command import evaluate, sample, train
for main, words in (
    (train.main, [*tiny, f"runs={runs}", "+backbone.widht=8"]),
    (train.main, ["condition=[text]", f"runs={runs}", "+condition.text.layerz=[0]"]),
    (sample.main, [f"model={runs}/model", f"out={runs}/drawn", "sampler=ddim", "+sampler.etta=1"]),
):
    try:
        called(main, *words)
    except SystemExit as stop:
        print(stop)
say("mistakes")
called(sample.main, f"model={runs}/model", f"out={runs}/drawn", "count=1", "sampler.steps=1", "resolution=8")
called(evaluate.main, f"model={runs}/quickstart/autoencoder", f"out={runs}/measured", "metric=[reconstruction]", "batch=8", *data)
say("sample and evaluate")
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory, clip_folder, emoji_root):
    """What one process says that runs them all."""
    runs = write_runs(tmp_path_factory.mktemp("home") / "runs", clip_folder)
    build_stage(compose_config("train", TINY)).export(runs / "model")
    data = ["data=emoji", f"data.root={emoji_root}", "data.groups=[Activities]"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CONFIGS.parent), str(CONFIGS.parent / "tests")])}
    command = [sys.executable, "-c", SCRIPT, str(runs), *data, *TINY]
    ran = subprocess.run(command, cwd=runs, env=environment, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_help_comes_at_once(answer):
    """Nothing heavy is imported before the config is composed."""
    assert "after the quickstart's import []" in answer, "tqdm reads as it is imported how often it is to print"
    for command in ("train", "sample", "evaluate", "precompute"):
        assert f"after {command} --help []" in answer
    assert answer.count("Choices, GROUP=NAME") == 4 and "sampler: consistency, ddim, ddpm, dpmpp" in answer


def test_a_mistake_is_shown_before_what_is_slow_to_import(answer):
    assert "error: backbone.widht: ldm.backbone.mlp.MLP has no such setting. Did you mean `width`?" in answer
    assert "error: condition.text.layerz: ldm.condition.text.Text has no such setting. Did you mean `layers`?" in answer
    assert "error: sampler.etta: ldm.sampler.ddim.DDIM has no such setting." in answer
    assert "after mistakes ['numpy', 'torch', 'torchvision']" in answer


def test_drawing_and_measuring_import_neither_lightning_nor_what_they_do_not_use(answer):
    assert "1 pictures are in" in answer and "after sample and evaluate ['numpy', 'torch', 'torchvision']" in answer
