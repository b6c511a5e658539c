"""The tour: no outputs in the repository, and it runs."""

import os

import nbformat
import pytest

from ldm.command_line import CONFIGS

NOTEBOOKS = sorted((CONFIGS.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_kept_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not [c for c in cells if c.cell_type == "code" and (c.outputs or c.execution_count)]
    assert path.stat().st_size < 50_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """On a model of a few steps."""
    from nbclient import NotebookClient

    from ldm.command_line import compose_config
    from train import train

    monkeypatch.chdir(CONFIGS.parent)
    few = ["trainer.max_steps=2", "trainer.val_check_interval=2", "logger=[csv]", f"runs={tmp_path}"]
    for stage, experiment in [("clip", "emoji/clip"), ("autoencoder", "emoji/autoencoder"), ("diffusion", "emoji/text")]:
        train(compose_config("train", [f"experiment={experiment}", f"run_id=quickstart/{stage}", "callback=[ema]", *few]))
    monkeypatch.setitem(os.environ, "LDM_MODEL", str(tmp_path / "quickstart" / "diffusion"))
    NotebookClient(nbformat.read(path, as_version=4), timeout=600, kernel_name="python3").execute(cwd=str(path.parent))
