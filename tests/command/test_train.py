"""`train` as a command: what it returns to a sweeper, and which mistakes are one line and which a traceback."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from helpers.command import called
from ldm.command import train
from ldm.compose import CONFIGS, compose_config
from ldm.errors import Refusal

TINY = ["condition=[]", "autoencoder=identity", "backbone=mlp", "backbone.size=8", "backbone.width=8"]
TINY += ["trainer.max_steps=1", "trainer.val_check_interval=1", "data.batch=4", "data.size=8", "data.workers=0"]
TINY += ["callback=[checkpoint]", "logger=[]"]


@pytest.fixture
def tiny(emoji_root, tmp_path):
    """The words of a training of a second."""
    data = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2"]
    return [*TINY, *data, "trainer.accelerator=cpu", f"runs={tmp_path}"]


def test_training_returns_the_number_that_a_sweeper_wants(tiny):
    """Also where the run was finished before, as a sweeper may try the same settings twice."""
    config = compose_config("train", [*tiny, "optimize=val/loss"])
    loss = train.run(config)
    assert 0.1 < loss < 10 and train.run(config) == loss
    config.optimize = "val/los"
    with pytest.raises(Refusal, match=r"optimize=val/los: no such number was logged in .*; what was: .*val/loss"):
        train.run(config)


def test_a_strategy_that_there_is_not_is_refused_with_those_that_there_are(tiny):
    with pytest.raises(Refusal, match=r"trainer\.strategy=dpp: wanted trainer=ddp, trainer=fsdp, or one of auto, .*ddp"):
        train.run(compose_config("train", [*tiny, "trainer.strategy=dpp"]))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="needs the extra `optuna`")
def test_hydras_optuna_sweeper_takes_the_best_of_three(tiny, tmp_path):
    sweep = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "optimize=val/loss"]
    words = [*sweep, "optimizer.lr=interval(0.001,0.1)", *tiny]
    answer = subprocess.run(
        [sys.executable, "train.py", *words], cwd=CONFIGS.parent, capture_output=True, text=True, timeout=1800
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    best = float(re.search(r"best_value: (\S+)", (tmp_path / "multirun" / "optimization_results.yaml").read_text())[1])
    losses = [re.search(r'"val/loss": ([\d.]+)', path.read_text())[1] for path in tmp_path.rglob("optimized.json")]
    assert len(losses) == 3 and best == min(map(float, losses))


WRONG = """
import torch
from torch import nn


class Wrong(nn.Module):
    blocks = ()

    def __init__(self, channels, widths):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, noise_level, cond):
        print("anomalies are looked for:", torch.is_anomaly_enabled())
        b, c, h = x.shape
        return x
"""


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """The words for a backbone of a package outside the tree, with a mistake in it, and its file."""
    configs = tmp_path / "mistaken" / "configs" / "backbone"
    configs.mkdir(parents=True)
    for folder in (configs.parent, configs.parent.parent):
        (folder / "__init__.py").touch()
    (tmp_path / "mistaken" / "wrong.py").write_text(WRONG)
    (configs / "wrong.yaml").write_text("_target_: mistaken.wrong.Wrong\n_partial_: true\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["hydra.searchpath=[pkg://mistaken.configs]", "allow=[mistaken]", "backbone=wrong"]
    return words, tmp_path / "mistaken" / "wrong.py"


def test_a_mistake_in_ones_own_code_shows_its_file_and_line(wrong, tiny, capsys):
    """Though it is a ValueError, as refusals are; and with debug in one process, whatever the trainer is told."""
    words, file = wrong
    tiny = [word for word in tiny if not word.startswith("backbone")]
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        called(train.main, *words, *tiny)
    last = error.traceback[-1]
    assert not isinstance(error.value, Refusal) and last.path == file
    assert "b, c, h = x.shape" in str(last.statement)
    assert "anomalies are looked for: False" in capsys.readouterr().out
    with pytest.raises(ValueError, match="too many values to unpack"):
        called(train.main, *words, *tiny, "debug=true", "trainer.devices=2", "trainer.strategy=ddp", "run_id=again")
    assert "anomalies are looked for: True" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["autoencoder=trained", "autoencoder.path=/nowhere"], "There is no autoencoder in /nowhere"),
        (["trainer.accelerator=gpu"], r"trainer\.accelerator=gpu"),
    ],
)
def test_a_refusal_is_one_line_and_with_debug_a_traceback(words, message, tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        called(train.main, *tiny, *words)
    if "autoencoder=trained" in words:
        with pytest.raises(Refusal, match=message):
            called(train.main, *tiny, *words, "debug=true")


@pytest.mark.parametrize(
    "words, message",
    [
        (["+trainer.devices=2"], r"\+trainer\.devices: there is such a setting already; say trainer\.devices=\.\.\."),
        (["hydra.verbos=true"], "hydra.verbos|verbos"),
        (["hydra/sweeper=optunaa"], "optunaa"),
    ],
)
def test_a_mistake_in_hydras_own_words_is_one_line(words, message):
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        called(train.main, *words)


@pytest.mark.slow
def test_lightnings_own_processes_find_the_command(tiny, tmp_path):
    """`ldm train` on two devices: Lightning starts the second process with the entry point's words, less the command."""
    two = ["trainer.devices=2", "trainer.strategy=ddp", "run_id=two"]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-m", "ldm", "train", *tiny, *two],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert (tmp_path / "two" / "model.safetensors").is_file() and answer.stdout.count("The trained model is in") == 1
