"""Commands that are printed have the form in which the program was called, and its places those of the environment."""

import sys

import pytest
from omegaconf import OmegaConf

from ldm.compose import CONFIGS
from ldm.files.called import command_line


@pytest.mark.parametrize(
    "program, said",
    [
        ("/usr/local/bin/ldm", "ldm train"),
        ("/lib/python/site-packages/ldm/__main__.py", "python -m ldm train"),
        ("evaluate.py", "python train.py"),
        ("/opt/notebook/kernel.py", "ldm train"),
    ],
)
def test_a_command_is_printed_as_the_person_calls_it(program, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program])
    assert command_line("train") == said


@pytest.mark.parametrize("name", ["shards", "latents", "stream"])
def test_the_environment_says_where_the_cache_is_and_a_setting_says_it_over_it(name, monkeypatch):
    config = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
    monkeypatch.delenv("LDM_CACHE", raising=False)
    assert config.cache == "~/.cache/ldm"
    monkeypatch.setenv("LDM_CACHE", "/fast/cache")
    assert config.cache == "/fast/cache"
    assert OmegaConf.merge(config, {"cache": "/other"}).cache == "/other"
