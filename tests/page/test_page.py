"""What lies behind the page: inputs made from embedders, requests that become words, and commands that draw the same bytes."""

import json
import random
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from helpers.finetune import at_rest, sha
from helpers.page import LABELS, SIZE, bytes_of, drawn, half_mask, labels, picture, save_small, session
from ldm.adapt import ADAPTED
from ldm.autoencoder.identity import Identity
from ldm.build import adapted, build
from ldm.command.draw import session_of
from ldm.command.sample import sample
from ldm.compose import CONFIGS, compose_config, quote
from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.files.called import command_line
from ldm.files.folder import save_model
from ldm.page.session import Stopped
from ldm.page.words import command_of, number, strengths, words_of

ALL = ["text", "label", "boxes", "map", "hole", "depth", "score"]


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """Commands are printed as `ldm sample ...`, wherever the tests are started."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ldm"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    save_small(place / "all", ALL)
    save_small(place / "text", ["text"])
    save_small(place / "other", ["text", "label"], seed=1)
    return place


@pytest.fixture(scope="module")
def whole(folder):
    return session(folder / "all", folder / "drawn of all")


@pytest.fixture(scope="module")
def plain(folder):
    return session(folder / "text", folder / "drawn")


ASKED = {
    "prompt": "a fox, '[red|blue]' & $HOME ${x} \\ (1:2) 100%",
    "negative": "[ugly, grey]",
    "seed": 7,
    "count": 3,
    "batch": 2,
    "steps": 2,
    "guidance": 2.5,
    "sampler": "ddim",
    "width": SIZE,
    "height": SIZE,
    "ask": {"label": "Food, Drink", "boxes": [[1, 0.1, 0.1, 0.6, 0.9], [3, 0.5, 0, 1, 0.4]], "score": 2.5},
}


def given():
    painted = [[(x + y) % 4 for x in range(SIZE)] for y in range(SIZE)]
    return {"ask.image": picture(), "ask.mask": half_mask(), "ask.depth": picture("L", (16, 16), 90), "map.map": labels(painted)}


def again(command, out):
    """Draws as a person would who copies the command -> the files."""
    called = f"{command_line('sample')} "
    assert command.startswith(called)
    sample(compose_config("sample", [*shlex.split(command.removeprefix(called)), f"out={out}"]))
    return [path.read_bytes() for path in sorted(Path(out).glob("[0-9][0-9][0-9][0-9][0-9].png"))]


def test_the_command_draws_the_same_bytes_whatever_was_asked(whole, tmp_path):
    drawing = drawn(whole, ASKED, given())[-1]["drawing"]
    files = bytes_of(drawing, whole.out)
    assert len(files) == 3 == len(set(files)) and drawing["seeds"] == [7, 8, 9]
    assert again(drawing["command"], tmp_path) == files
    assert json.loads((whole.out / drawing["folder"] / "request.json").read_text())["prompt"] == ASKED["prompt"]
    assert (whole.out / drawing["folder"] / "command.txt").read_text() == drawing["command"] + "\n"
    assert {name.split(".")[1] for name in drawing["shown"]} == {"boxes", "map", "hole", "depth"}


@pytest.mark.parametrize(
    "edit", [{"init": picture()}, {"init": picture("RGBA", (20, 9)), "mask": picture(size=(20, 9), colour="white")}]
)
def test_pictures_begin_from_uploads(plain, tmp_path, edit):
    drawing = drawn(plain, {"prompt": "fox", "strength": 0.7, "steps": 4}, edit)[-1]["drawing"]
    assert "strength=0.7" in drawing["command"] and again(drawing["command"], tmp_path) == bytes_of(drawing, plain.out)


def test_everything_that_is_asked_is_a_word(whole):
    inputs, names = whole.inputs[whole.models[0]], ("init", "ask.map", "ask.image", "ask.mask", "ask.boxes")
    files = {name: Path(f"{name}.png") for name in names}
    words = words_of({**ASKED, "strength": 0.5}, files, inputs, whole.samplers)
    assert words[:2] == [f"prompt={ASKED['prompt']}", "negative='[ugly, grey]'"] and sorted(words[2:]) == [
        "ask.boxes=ask.boxes.png",
        "ask.image=ask.image.png",
        "ask.label=Food, Drink",
        "ask.map=ask.map.png",
        "ask.mask=ask.mask.png",
        "ask.score=2.5",
        "batch=2",
        "count=3",
        "guidance.scale=2.5",
        "init=init.png",
        "resolution=[8,8]",
        "sampler.steps=2",
        "sampler=ddim",
        "seed=7",
        "strength=0.5",
    ]


def test_inputs_are_made_from_embedders(whole):
    fields = whole.description["fields"]
    kinds = {field: one["kind"] for field, one in fields.items()}
    picture_kinds = {"map": "map", "image": "picture", "mask": "mask", "depth": "picture"}
    assert kinds == {"caption": "text", "label": "choice", "boxes": "boxes", "score": "number", **picture_kinds}
    assert list(fields["label"]["names"]) == LABELS and fields["score"]["usual"] == 5 and fields["mask"]["over"] == "image"
    assert len(fields["map"]["colours"]) == 4 and fields["map"]["colours"][0] == "#ffffff"
    json.dumps(whole.description)


def test_what_is_usual_is_the_models(plain):
    (model,) = plain.description["models"]
    assert model["size"] == [SIZE, SIZE] and (model["sampler"], model["steps"], model["guidance"]) == ("euler_ancestral", 3, 2)
    assert {path.stem for path in (CONFIGS / "sampler").glob("*.yaml")} == set(plain.samplers)


class Bare(Condition):
    """A person's own condition, which says nothing of a page."""


@pytest.mark.parametrize("classes, wanted", [(1000, (0, 999)), (["1", "2"], (0, 1)), (["a", "A"], (0, 1))])
def test_classes_without_names_that_tell_them_apart_are_numbers(classes, wanted):
    from ldm.condition.label import Label

    one = Label(classes, 4).input("label")
    assert one.kind == "number" and one.whole and (one.low, one.high) == wanted and Bare().input("x") == Input("text")


TOWERS = (
    "model",
    "vocabulary",
    "load",
    "towers",
    "members",
)  # which texts read with: a line, as of any condition that says nothing
NODES = [OmegaConf.to_container(OmegaConf.load(path))[path.stem] for path in sorted((CONFIGS / "condition").glob("*.yaml"))]


@pytest.mark.parametrize("node", [node for node in NODES if not node.keys() & {*TOWERS}], ids=lambda node: node["_target_"])
def test_every_condition_says_how_its_fields_are_written(node):
    with torch.device("meta"):
        embedder = build(node)
        embedder = embedder(autoencoder=Identity()) if node.get("_partial_") else embedder
    fields = [embedder.key] if isinstance(embedder.key, str) else embedder.key
    inputs = {field: embedder.input(field) for field in fields}
    assert [field for field, one in inputs.items() if one is None] in ([], ["low_noise"])
    assert all(len(one.names) == len(one.colours) > 1 for one in inputs.values() if one and one.kind in ("map", "boxes"))


def test_any_text_survives_the_command():
    """What a person types into the page is what the command says, and no list, no number, and no interpolation of it."""
    signs = [*"ab '\"[]{}()$\\,=:#~|!*;&é🦊\n\t", "${", "null", "1", "true", "~/", "\x00", "\u2028"]
    chance = random.Random(0)
    parser = OverridesParser.create()
    for i in range(400):
        text = "".join(chance.choice(signs) for _ in range(i % 12))
        words = words_of({"prompt": text, "negative": text}, {}, {"caption": Input("text")}, [])
        typed = shlex.split(command_of(words).removeprefix(f"{command_line('sample')} "))
        values = OmegaConf.create({o.key_or_group: o.value() for o in parser.parse_overrides(quote(typed))})
        flat = " ".join("".join(" " if sign in "\n\t\x00\u2028" else sign for sign in text).split())
        assert " ".join(values.prompt.split()) == flat and (flat == "" or values.negative == values.prompt)


def test_steps_are_told_with_estimates(plain):
    events = drawn(plain, {"prompt": "fox", "count": 3, "batch": 2, "steps": 3})
    steps = [(event["step"], event["of"], event["first"]) for event in events if "step" in event]
    assert steps == [(s, 3, first) for first in (0, 2) for s in (1, 2, 3)]
    shown = next(event["pictures"] for event in events if "pictures" in event)
    assert len(shown) == 2 and all(url.startswith("data:image/png;base64,") for url in shown)


def test_a_drawing_stops_at_the_next_step(plain):
    events, before = [], len(plain.drawings)
    with pytest.raises(Stopped):
        plain.draw({"prompt": "fox", "steps": 50}, {}, events.append, lambda: sum("step" in event for event in events) == 2)
    assert sum("step" in event for event in events) == 2 and len(plain.drawings) == before


def test_two_models_draw_side_by_side_with_the_same_seeds(folder, tmp_path):
    models = [str(folder / name) for name in ("text", "other")]
    both = session(models, tmp_path / "drawn")
    assert list(both.description["fields"]) == ["caption", "label"] and len(both.description["models"]) == 2
    asked = {"models": models, "prompt": "fox", "seed": 3, "ask": {"label": "Flags"}}
    one, other = (event["drawing"] for event in drawn(both, asked) if "drawing" in event)
    assert one["group"] == other["group"] and one["seeds"] == other["seeds"] == [3]
    assert (one["model"], other["model"]) == tuple(models) and bytes_of(one, both.out) != bytes_of(other, both.out)
    for i, drawing in enumerate((one, other)):
        assert again(drawing["command"], tmp_path / f"again {i}") == bytes_of(drawing, both.out)
    assert "label" not in one["command"] and "label" in other["command"]
    with pytest.raises(Refusal, match="there are"):
        drawn(both, {"models": ["elsewhere"]})
    with pytest.raises(Refusal, match="twice"):
        session([models[0], models[0]], tmp_path)


REFUSED = {
    "steps=0: wanted a number from 1 to 1000": {"steps": 0},
    "steps=2.5: wanted a whole number": {"steps": 2.5},
    "count=65": {"count": 65},
    "guidance=nan": {"guidance": float("nan")},
    "seed=True": {"seed": True},
    "seed=3: wanted": {"seed": "3"},
    "width=8 height=None: say both": {"height": None},
    "height=1000000: wanted a number from 1 to 4096": {"width": 8, "height": 1_000_000},
    "sampler=dpm: there is no such choice": {"sampler": "dpm"},
    "prompt: wanted a text": {"prompt": ["a", "b"]},
    "at most 20000": {"prompt": "a" * 30_000},
    "model: the page asks for no such thing": {"model": "/etc/passwd"},
    "out: the page asks": {"out": "/tmp/x"},
    "ask.label=Fud: there is no such choice": {"ask": {"label": "Fud"}},
    "ask.image: wanted a picture": {"ask": {"image": "/etc/passwd"}},
    "ask.score=x: wanted a number": {"ask": {"score": "x"}},
    "ask: wanted values by field": {"ask": [1]},
    "Found the box": {"ask": {"boxes": [[9, 0, 0, 1, 1]]}},
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_requests_are_refused_in_a_line(whole, line):
    with pytest.raises(Refusal, match=line) as refused:
        asked = {**ASKED, **REFUSED[line]}
        drawn(whole, asked, {name: data for name, data in given().items() if name[4:] not in asked["ask"]})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "line, pictures",
    [
        ("ask.image: no picture in", {"ask.image": b"<html>"}),
        ("more than the .* pixels", {"ask.image": picture("1", (9000, 9000), 1)}),
        ("init: .*truncated", {"init": picture(size=(64, 64))[:60]}),
        ("map: 300|labels from .* to 300", {"map.map": labels([[300] * SIZE] * SIZE)}),
        ("is full", {"ask.mask": picture(colour="white")}),
        ("sketch: no model here reads", {"sketch": picture()}),
        ("../x: no model", {"../x": picture()}),
    ],
)
def test_bad_pictures_are_refused_in_a_line(whole, line, pictures):
    before = sorted(whole.out.glob("[0-9]*"))
    with pytest.raises(Refusal, match=line):
        drawn(whole, ASKED, {**given(), **pictures})
    assert sorted(whole.out.glob("[0-9]*")) == before


def test_uploads_are_kept_as_they_came_and_once(plain):
    data = picture("RGBA", (5, 7), form="WEBP")
    kept = plain.keep("init", data)
    assert kept.read_bytes() == data and kept.suffix == ".webp" and plain.keep("init", data) == kept
    painted = plain.keep("map.map", labels([[0, 299], [3, 1]]))
    assert np.asarray(Image.open(painted)).tolist() == [[0, 299], [3, 1]]


def test_numbers_go_on_where_another_session_stopped(plain, folder):
    first = drawn(plain, {"prompt": "fox"})[-1]["drawing"]
    other = session(folder / "text", plain.out)
    second = drawn(other, {"prompt": "fox"})[-1]["drawing"]
    assert int(second["folder"]) > int(first["folder"]) and bytes_of(first, plain.out) == bytes_of(second, plain.out)


def test_adapters_have_the_strength_of_their_sliders():
    words = ["style.safetensors:0.8", "edges=a b/c:0.5:0.25", "plain"]
    assert strengths(words, [0.8, 0.5, 1]) == words
    assert strengths(words, [-0.5, 1, 0.3]) == ["style.safetensors:-0.5", "edges=a b/c:1:0.25", "plain:0.3"]
    assert strengths(["canny:guess", "canny:0.5:guess"], [0.7, 0.7]) == ["canny:0.7:guess"] * 2
    with pytest.raises(Refusal, match="3 strengths are wanted"):
        strengths(words, [1])
    with pytest.raises(Refusal, match="strength=nan"):
        strengths(words, [1, 1, float("nan")])


def test_the_command_is_called_as_this_one_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ldm"])
    assert command_of(["prompt=a fox", "seed=0", "negative="]) == "ldm sample prompt='a fox' seed=0 negative="
    monkeypatch.setattr(sys, "argv", ["ldm/__main__.py"])
    assert command_of(["seed=0"]) == "python -m ldm sample seed=0"
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    assert command_of(["seed=0"]) == "python sample.py seed=0"
    assert number("x", 3, None, None) == 3 and torch.get_default_dtype() == torch.float32


@pytest.fixture(scope="module")
def styled(tmp_path_factory):
    """A session of a model with a loud LoRA, whose folder's name has signs of lists in it."""
    place = tmp_path_factory.mktemp("styled")
    base = at_rest(place / "base", {"label": {"_target_": "ldm.condition.label.Label", "classes": 3, "width": 8}})
    node = {"_target_": "ldm.adapter.lora.LoRA", "rank": 2}
    model = adapted(base, {"lora": build(node)})
    tensors = {name: torch.randn_like(x) for name, x in model.state_dict().items() if name in model.trained}
    recipe = {"_target_": ADAPTED, "base": {"path": base, "sha256": sha(base)}, "adapters": {"lora": node}}
    run = place / "a, 'b' (c)"
    save_model(tensors, recipe, run)
    made = session_of(compose_config("draw", [f"model={base}", "device=cpu", f"out={place / 'drawn'}", f"adapters={run}:0.5"]))
    made.load()
    return made


def test_a_slider_draws_at_its_strength(styled, tmp_path):
    asked = {"ask": {"label": 1}, "steps": 2, "width": SIZE, "height": SIZE}
    assert [one["strength"] for one in styled.description["adapters"]] == [0.5]
    files = []
    for i, strength in enumerate((0.5, 0, -1.25)):
        drawing = drawn(styled, {**asked, "adapters": [strength]})[-1]["drawing"]
        files.append(bytes_of(drawing, styled.out))
        assert again(drawing["command"], tmp_path / str(i)) == files[-1]
    assert len({file for (file,) in files}) == 3
    with pytest.raises(Refusal, match="1 strengths are wanted"):
        drawn(styled, asked)
