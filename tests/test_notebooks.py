"""The notebooks: kept without outputs, and they run on any text-to-picture model."""

import ast
import json
import re
import sys

import nbformat
import pytest

from ldm.compose import CONFIGS, compose_config

ROOT = CONFIGS.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IMPORTS = {"ldm", "torch", "matplotlib", *sys.stdlib_module_names}
SMALL = {
    "clip": ["clip.text_cfg.width=16", "clip.text_cfg.heads=2", "clip.vision_cfg.width=32", "clip.embed_dim=8"],
    "autoencoder": ["autoencoder.width=8", "autoencoder.groups=4"],
    "diffusion": ["backbone.width=16", "backbone.groups=4", "backbone.heads=2"],
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def model(tmp_path_factory, emoji_root):
    """The folder of a model of two steps."""
    from ldm.command.train import train

    runs = tmp_path_factory.mktemp("runs")
    few = ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch=8", "callback=[ema]", "logger=[csv]"]
    data = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2"]
    for stage, experiment in {"clip": "emoji/clip", "autoencoder": "emoji/autoencoder", "diffusion": "emoji/text"}.items():
        where = [f"experiment={experiment}", f"run_id=quickstart/{stage}", f"runs={runs}"]
        folder = train(compose_config("train", [*where, *few, *data, *SMALL[stage]]))
    return folder


@each_notebook
def test_notebooks_are_kept_without_outputs(path):
    """Nor with absolute paths, or ids that change with each save."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not [c.id for c in notebook.cells if c.cell_type == "code" and (c.outputs or c.execution_count is not None)]
    assert notebook.metadata.kernelspec.name == "python3" and path.stat().st_size < 30_000
    assert all(re.fullmatch("[a-z]+", cell.id) for cell in notebook.cells)
    assert not re.search(r"/(work|home|Users|root|tmp)/", json.dumps(notebook))


@each_notebook
def test_notebooks_need_only_the_project(path):
    code = [ast.parse(c.source) for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    nodes = [node for tree in code for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= IMPORTS


def test_the_notebook_for_colab_asks_for_the_repository(monkeypatch):
    """Where the project is not installed, and nobody has said where it lies, the first cell says so and does nothing."""
    first, *_ = (c.source for c in nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4).cells if c.cell_type == "code")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda *words, **_: pytest.fail("something was started"))
    with pytest.raises(ValueError, match="Write the address of the project's repository into REPOSITORY"):
        exec(compile(first, "colab.ipynb", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("start", [".", "notebooks"])
@each_notebook
def test_notebooks_run(path, start, model, monkeypatch):
    cells = run(path, start, model, monkeypatch).cells
    shown = {c.id: [o for o in c.outputs if "image/png" in o.get("data", {})] for c in cells if "\nshow(" in c.source}
    assert shown and all(shown.values())


@pytest.mark.slow
@each_notebook
def test_notebooks_say_what_to_do_without_a_model(path, tmp_path, monkeypatch):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="Run `make quickstart` first"):
        run(path, "notebooks", tmp_path / "nothing", monkeypatch)


def run(path, start, model, monkeypatch):
    """The notebook with its outputs, begun in the folder `start` of the project."""
    from nbclient import NotebookClient

    monkeypatch.setenv("LDM_MODEL", str(model))
    monkeypatch.setenv("LDM_SECONDS", "2")  # of the trainings inside
    notebook = nbformat.read(path, as_version=4)
    return NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(ROOT / start))
