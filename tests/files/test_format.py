"""What was saved before the format had a number, or things their present names, loads and draws as it did."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ldm.build import build, load_autoencoder, load_model
from ldm.check import parameters_of
from ldm.drawing.generate import generate
from ldm.files import moved as table
from ldm.files.folder import (
    FORMAT,
    LaterFormat,
    load_tensors,
    read_json,
    read_model,
    read_recipe,
    save_model,
    save_tensors,
    write_json,
)
from ldm.files.moved import moved, moved_names
from ldm.guidance.cfg import CFG
from ldm.sampler.ddim import DDIM
from ldm.training.saved import newest, read_checkpoint

BEFORE = Path(__file__).parents[1] / "data" / "format0"
ASKS = {
    "text": {"caption": ["a fox", "two"]},
    "classes": {"label": torch.tensor([1, 2])},
    "words": {"caption": ["a fox", "red"]},
    "xl": {"caption": ["a fox", "two"], "height": torch.tensor([8, 8]), "crop": torch.tensor([0, 3])},
}
TARGETS = json.loads((BEFORE / "targets.json").read_text())


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The folder, with the vocabularies' rows by their formula (make.py)."""
    home = tmp_path_factory.mktemp("before") / "format0"
    shutil.copytree(BEFORE, home)
    for path in home.rglob("open_clip_model.safetensors"):
        tensors = load_tensors(path)
        width = tensors["positional_embedding"].shape[1]
        rows = (torch.arange(49408 * width, dtype=torch.float64) * 0.37).sin().reshape(-1, width).float()
        save_tensors(tensors | {"token_embedding.weight": rows}, path)
    return home


@pytest.fixture(scope="module")
def expected():
    return load_tensors(BEFORE / "expected.safetensors")


def drawn(model, ask):
    return generate(model, ask, DDIM(3), CFG(2.0), [5, 6], (8, 8))


@pytest.mark.parametrize("family", ASKS)
def test_a_model_of_before_draws_as_it_did(family, before, expected):
    """U-Net with CLIP and KL, DiT with classes and VQ, the LDM paper's words, XL's two towers and numbers."""
    model = load_model(before / family)
    torch.testing.assert_close(drawn(model, ASKS[family]), expected[f"{family}.drawn"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["text", "classes"])
def test_an_autoencoder_of_before_encodes_as_it_did(family, before, expected):
    autoencoder = load_autoencoder(str(before / family / "autoencoder"))
    picture = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    encoded = autoencoder.encode(picture).mean
    torch.testing.assert_close(encoded, expected[f"{family}.encoded"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(autoencoder.decode(encoded), expected[f"{family}.decoded"], atol=2e-5, rtol=1e-4)


def test_a_checkpoint_of_before_draws_as_it_did(before, expected):
    model = load_model(before / "trained")
    torch.testing.assert_close(drawn(model, ASKS["classes"]), expected["checkpoint.drawn"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_before_is_somewhere_and_takes_what_it_took(target):
    node = moved({"_target_": target, **dict.fromkeys(TARGETS[target])})
    names, open_ended = parameters_of(node.pop("_target_"))
    assert open_ended or node.keys() - {"recipe"} <= set(names)  # which build.py takes off a stage


# ---- the number


def test_what_is_saved_says_its_format(before, tmp_path):
    recipe, weights = read_model(before / "classes")
    save_model(weights, recipe, tmp_path)
    assert read_json(tmp_path / "config.json") == {"format": FORMAT, **recipe} and read_recipe(tmp_path) == recipe
    with pytest.raises(ValueError, match=r"format=3: config\.json has this name for itself"):
        save_model(weights, {**recipe, "format": 3}, tmp_path)


@pytest.mark.parametrize("number", [FORMAT + 1, "1", True, -1, None])
def test_a_later_format_is_refused(number, before, tmp_path):
    write_json({"format": number, **read_json(before / "classes" / "config.json")}, tmp_path / "config.json")
    shutil.copy(before / "classes" / "model.safetensors", tmp_path)
    for load in (load_model, load_autoencoder):
        with pytest.raises(ValueError, match=rf"config\.json is of format {number!r}, and this version .* up to {FORMAT}"):
            load(str(tmp_path))


def test_a_checkpoint_of_a_later_format_is_not_passed_over_as_damaged(before, tmp_path):
    (path,) = before.rglob("*.ckpt")
    torch.save(read_checkpoint(path) | {"format": FORMAT + 1}, tmp_path / "later.ckpt")
    shutil.copy(path, tmp_path / "earlier.ckpt")
    os.utime(tmp_path / "earlier.ckpt", (0, 0))
    for read in (lambda: read_checkpoint(tmp_path / "later.ckpt"), lambda: newest(tmp_path), lambda: load_model(tmp_path)):
        with pytest.raises(LaterFormat, match=r"later\.ckpt is of format"):
            read()


# ---- what has moved


@pytest.fixture
def rows(monkeypatch):
    """Rows as a move would add them: a room twice moved, one class apart, a parameter, and a layer's name."""
    monkeypatch.setitem(table.MOVED, "ldm.ancient", "ldm.old")
    monkeypatch.setitem(table.MOVED, "ldm.old", "ldm.sampler")
    monkeypatch.setitem(table.MOVED, "ldm.old.ddim.Implicit", "ldm.sampler.ddim.DDIM")
    monkeypatch.setitem(table.PARAMETERS, "ldm.sampler.ddim.DDIM", {"count": "steps"})
    monkeypatch.setitem(table.TENSORS, "speak.last", "out.2")


def test_moved_names_are_read_as_the_present_ones(rows):
    for old in ("ldm.old.ddim.Implicit", "ldm.ancient.ddim.Implicit", "ldm.ancient.ddim.DDIM", "ldm.sampler.ddim.DDIM"):
        assert build({"_target_": old, "count": 7}) == DDIM(7)
    assert moved({"a": [{"_target_": "ldm.old.heun.Heun"}]}) == {"a": [{"_target_": "ldm.sampler.heun.Heun"}]}
    assert moved({"_target_": "ldm.older.X", "count": 1}) == {"_target_": "ldm.older.X", "count": 1}
    with pytest.raises(ValueError, match="has no such setting"):
        build({"_target_": "ldm.old.ddim.Implicit", "count": 7, "steps": 7})
    tensors = moved_names(
        {"net.speak.last.weight": torch.ones(1), "speak.lasting": torch.ones(1), "n": {"speak.last": torch.ones(1)}}
    )
    assert list(tensors) == ["net.out.2.weight", "speak.lasting", "n"] and list(tensors["n"]) == ["out.2"]


def test_saved_models_are_read_through_the_table(before, expected, monkeypatch, tmp_path):
    """A folder, its autoencoder's and a checkpoint, all of older names, still draw the same."""
    monkeypatch.setitem(table.MOVED, "ldm.backbone.vit", "ldm.backbone.dit")
    monkeypatch.setitem(table.MOVED, "ldm.backbone.perceptron.Perceptron", "ldm.backbone.mlp.MLP")
    monkeypatch.setitem(table.MOVED, "ldm.autoencoder.quantised", "ldm.autoencoder.vq")
    monkeypatch.setitem(table.PARAMETERS, "ldm.backbone.dit.DiT", {"features": "width"})
    monkeypatch.setitem(table.TENSORS, "denoiser.backbone.first", "denoiser.backbone.embed")
    monkeypatch.setitem(table.TENSORS, "denoiser.backbone.entry", "denoiser.backbone.inp")
    shutil.copytree(before / "classes", tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path / "model" / "autoencoder"):
        text = (folder / "config.json").read_text().replace("backbone.dit", "backbone.vit").replace("coder.vq", "coder.quantised")
        (folder / "config.json").write_text(text.replace('"width": 8,\n    "depth"', '"features": 8,\n    "depth"'))
    tensors = load_tensors(tmp_path / "model" / "model.safetensors")
    old = {name.replace("backbone.embed", "backbone.first"): x for name, x in tensors.items()}
    assert old.keys() != tensors.keys() and "features" in (tmp_path / "model" / "config.json").read_text()
    save_tensors(old, tmp_path / "model" / "model.safetensors")
    torch.testing.assert_close(
        drawn(load_model(tmp_path / "model"), ASKS["classes"]), expected["classes.drawn"], atol=2e-5, rtol=1e-4
    )
    (path,) = before.rglob("*.ckpt")
    held = torch.load(path, weights_only=True)
    held["recipe"]["backbone"]["_target_"] = "ldm.backbone.perceptron.Perceptron"
    for state in (held, held["callbacks"]["EMA"]):
        name = "state_dict" if state is held else "average"
        state[name] = {n.replace("backbone.inp", "backbone.entry"): x for n, x in state[name].items()}
    torch.save(held, tmp_path / "a.ckpt")
    torch.testing.assert_close(
        drawn(load_model(tmp_path / "a.ckpt"), ASKS["classes"]), expected["checkpoint.drawn"], atol=2e-5, rtol=1e-4
    )
