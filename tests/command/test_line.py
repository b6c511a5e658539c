"""Free text, mistyped names and the identity of a run."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from helpers.command import called
from helpers.data import ODD
from ldm.build import NARROW, build
from ldm.command import precompute, sample, train
from ldm.compose import CONFIGS, FREE_TEXT, _is_whole, _listed, check_overrides, compose_config, prepared, quote
from ldm.errors import Refusal

ROOT = CONFIGS.parent
TEXTS = [
    "a lion, detailed fur",
    "lion's mane",
    "it's 'so' quoted",
    "café",
    "🦊 in snow",
    "brackets (and [more] of {them})",
    "x=y, z = w",
    "3",
    "true",
    "null",
    "shot {0..9}",
    "ends in a backslash \\",
    "back\\'slash",
    "${not.resolved}",
    "two\nlines",
    "a:b c#d",
    "",
    "  spaces  ",
]


def parsed(argument):
    return OverridesParser.create().parse_overrides(quote([argument]))[0]


@pytest.mark.parametrize("text", [t for t in TEXTS if t], ids=repr)
@pytest.mark.parametrize("key", ["prompt", "negative", "out", "data.train", "model"])
def test_free_text_arrives_as_it_was(key, text):
    override = parsed(f"{key}={text}")
    if text == "null" and key not in ("prompt", "negative"):
        pytest.skip("no file is null")
    assert not override.is_sweep_override()
    value = override.value()
    assert str(value).replace(r"\${", "${") == text and not isinstance(value, int | bool) and value is not None


def test_any_text_at_all_arrives():
    """200 random words of the grammar's own signs, each to the letter, through Hydra's parser and OmegaConf's."""
    signs = [
        "'",
        '"',
        "\\",
        "[",
        "]",
        "{",
        "}",
        "(",
        "=",
        ",",
        ":",
        "$",
        "${",
        " ",
        "\n",
        "a",
        "é",
        "🦊",
        "#",
        "@",
        "*",
        "~",
        "3",
    ]
    choose = random.Random(0)
    texts = ["".join(choose.choices(signs, k=choose.randint(1, 8))) for _ in range(200)] + ["\\${a}", "x\\\n", "\\\\'"]
    texts = [text for text in texts if not _is_whole(text) and _listed(text)[0] != "["]
    wrong = {}
    for start in range(0, len(texts), 50):
        part = texts[start : start + 50]
        config = compose_config("sample", ["model=m", *(f"ask.n{i}={text}" for i, text in enumerate(part))])
        told = OmegaConf.to_container(config, resolve=True)["ask"]
        wrong |= {text: told[f"n{i}"] for i, text in enumerate(part) if told[f"n{i}"] != text}
    assert not wrong


def test_free_text_survives_composing():
    overrides = [f"ask.n{i}={text}" for i, text in enumerate(TEXTS) if text]
    ask = compose_config("sample", ["model=m", *overrides]).ask
    assert [ask[f"n{i}"] for i, text in enumerate(TEXTS) if text] == [text for text in TEXTS if text]


def test_pretrained_weights_are_a_place_or_a_truth_value():
    words = quote(["condition.t5.pretrained=false", "clip.pretrained=openai", "model.init=false"])
    assert words == ["condition.t5.pretrained=false", "clip.pretrained='openai'", "model.init='false'"]


def test_no_file_is_null_and_a_word_is_a_word():
    said = {"data.val": None, "model.init": None, "mask": None, "prompt": "null", "ask.label": "null", "data.train": "nullable"}
    for key, value in said.items():
        assert parsed(f"{key}={value or 'null'}").value() == value


def test_lists_and_quotes_stay_as_they_are():
    assert quote(["prompt='it'", 'prompt="a, b"', "seed=3"]) == ["prompt='it'", 'prompt="a, b"', "seed=3"]
    assert parsed("prompt=[red apple,fox]").value() == ["red apple", "fox"]


@pytest.mark.parametrize(
    "text, value",
    [
        ("[cat|dog] on a (red:1.2) mat", None),
        ("[masterpiece], girl", None),
        ("[cat], [dog]", None),
        ("[unclosed", None),
        ('"Hello" on a wall', None),
        ("'a', 'b'", None),
        ("'it's'", None),
        ("(a cat:1.3), b", None),
        ("[lion's mane, café]", ["lion's mane", "café"]),
        ("[a (red:1.2, big) cat, 'x, y', [z]]", ["a (red:1.2, big) cat", "x, y", "[z]"]),
        ("[null, 007, true, 1e5]", ["null", "007", "true", "1e5"]),
        (r"[a\(b\), c\,d]", [r"a\(b\)", "c,d"]),
    ],
)
def test_brackets_and_quotes_are_lists_and_strings_only_when_whole(text, value):
    assert parsed(f"prompt={text}").value() == (text if value is None else value)


PLACES = {"path", "weights", "pretrained", "vocabulary", "train", "val", "root", "folder", "cache", "checkpoints", "save_dir"}
PLACES |= {"model", "default_root_dir", "out", "images", "reference", "mask", "init", "prompts", "runs", "run_id", "resume"}
NUMBERS = {"data.weights"}  # shares of data sets


def test_every_key_of_the_configs_that_takes_a_path_is_free_text():
    """Those that hold a path now, and those of a name that takes one somewhere; whatever its signs, the path arrives."""
    met, keys = set(), set()
    for file in CONFIGS.rglob("*.yaml"):
        nodes = [(file.parent.name if file.parent != CONFIGS else "", OmegaConf.to_container(OmegaConf.load(file)))]
        while nodes:
            place, node = nodes.pop()
            for key, value in node.items():
                name = f"{place}.{key}".strip(".")
                if isinstance(value, dict):
                    nodes += [(name, value)] if key not in ("hydra", "defaults") else []
                elif isinstance(value, str) and re.search(r"\$\{(runs|folder|out)\}|^~/|^local-dir:|^runs/", value):
                    met.add(name)
                    keys.add(name)
                    assert FREE_TEXT.match(f"{name}=x"), name
                elif key in PLACES and name not in NUMBERS and not isinstance(value, dict):
                    keys.add(name)
                    assert FREE_TEXT.match(f"{name}=x"), name
    assert {"condition.text.model", "logger.csv.save_dir"} <= met
    keys.remove("run_id")  # of which other settings may be part
    place = f"/x/{ODD}${{i}}"
    wrong = {name for name in keys if parsed(f"{name}={place}").value().replace(r"\${", "${") != place}
    assert len(keys) > 50 and not wrong


def test_what_commands_of_before_added_is_set():
    """Settings that no config had, and now one has; those that were there are added to by nobody."""
    words = ["+trainer.strategy=ddp", "+trainer.enable_progress_bar=true", "+trainer.devices=2"]
    assert quote(words) == ["trainer.strategy=ddp", "trainer.enable_progress_bar=true", "+trainer.devices=2"]
    assert compose_config("train", words[:2]).trainer.enable_progress_bar is True


def test_a_home_is_found_behind_a_setting_and_a_run_is_named_by_others():
    home = Path("~").expanduser()
    said = {"out": "~/a b", "data.train": "[~/a,/b]", "ask.image": "~/x.png", "prompt": "~/x", "negative": "~"}
    wanted = {"out": f"{home}/a b", "data.train": [f"{home}/a", "/b"], "ask.image": f"{home}/x.png"}
    wanted |= {"prompt": "~/x", "negative": "~"}
    assert {key: parsed(f"{key}={value}").value() for key, value in said.items()} == wanted
    assert compose_config("train", ["run_id=x-${seed}", "seed=2", "runs=a ${b}"]).folder == "a ${b}/x-2"
    for wrong in ("run_id=${no.such}", "runs=null"):
        with pytest.raises(ValueError, match="name no folder"):
            compose_config("train", [wrong])
    asked = compose_config("sample", ["model=m", "prompt=[a ${x},'${y}']"])
    assert OmegaConf.to_container(asked, resolve=True)["prompt"] == ["a ${x}", "${y}"]


@pytest.mark.parametrize("place", ["/a/epoch=3-step=10, (best)", "/a [b]/c", "[x]/{y}", "/it's/$HOME/é"])
def test_a_path_is_a_path_wherever_it_stands(place):
    keys = [
        "resume",
        "runs",
        "run_id",
        "folder",
        "model.init",
        "data.root",
        "autoencoder.path",
        "condition.text.model",
        "loss.model",
    ]
    keys += ["callback.checkpoint.folder", "logger.csv.save_dir", "trainer.default_root_dir"]
    config = compose_config("train", ["experiment=emoji/text", *(f"{key}={place}" for key in keys)])
    assert {OmegaConf.select(config, key) for key in keys} == {place}
    config = compose_config(
        "evaluate", ["metric=[frechet]", f"metric.frechet.weights={place}", f"compare=[{place.replace(',', '')},b]"]
    )
    assert config.metric.frechet.weights == place and list(config.compare) == [place.replace(",", ""), "b"]


def test_ask_adds_what_it_names():
    assert compose_config("sample", ["model=m", "ask.label=[1,2]"]).ask.label == [1, 2]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_group_takes_the_name_of_a_setting(path):
    """Hydra would read `name=64` as a choice of a group `name`, in every script."""
    config = OmegaConf.to_container(OmegaConf.load(path))
    chosen = {name.removeprefix("optional ") for line in config["defaults"] if isinstance(line, dict) for name in line}
    assert not {folder.name for folder in CONFIGS.iterdir()} & config.keys() - chosen - {"hydra"}


def test_pictures_have_a_resolution_and_recipes_a_tiny_size():
    assert compose_config("sample", ["model=m", "resolution=64"]).resolution == 64
    assert compose_config("sample", ["model=m", "resolution=[24,40]"]).resolution == [24, 40]
    assert compose_config("evaluate", ["model=m", "resolution=512"]).resolution == 512
    assert compose_config("train", ["experiment=sd/v1", "size=tiny"]).data.size == 32


def test_a_size_may_choose_anew_what_a_recipe_chooses(tmp_path):
    """Its data, or its list of conditions, in a folder of one's own too; the command's own choice goes ahead of both."""
    words = ["experiment=sd/lora", "size=tiny"]
    assert compose_config("train", words).data._target_ == "ldm.data.emoji.Emoji"
    assert compose_config("train", [*words, "data=folder", "data.train=x"]).data._target_ == "ldm.data.folder.Folder"
    (tmp_path / "size" / "tiny" / "emoji").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /condition: [label]\ndata: {batch: 4}\n"
    (tmp_path / "size" / "tiny" / "emoji" / "text.yaml").write_text(text)
    config = compose_config("train", ["experiment=emoji/text", "size=tiny", f"hydra.searchpath=[file://{tmp_path}]"])
    assert "_target_" in config.condition.label and "_target_" not in config.condition.get("text", {}) and config.data.batch == 4
    with pytest.raises(Refusal, match=r"experiment=sd/v1,sd/v2: size= shrinks one experiment at a time"):
        prepared(["-m", "experiment=sd/v1,sd/v2", "size=tiny"], "train")


@pytest.mark.parametrize(
    "argument, message",
    [
        ("trainer.max_stepz=3", r"trainer has no `max_stepz`.*`max_steps`"),
        ("optimiser=adamw", r"the config has no `optimiser`.*`optimizer`"),
        ("optimizer=adamv", r"optimizer=adamv: there is no such choice.*`adamw`"),
        ("experiment=emoji/txt", r"no such choice.*`emoji/text`"),
        ("optimizer.lr=abc", r"optimizer\.lr=abc: a str was given where float is wanted"),
        ("trainer.max_steps=3.5", r"a float was given where int is wanted"),
        ("data.batch=true", r"a bool was given where int is wanted"),
        ("sampler=[ddim,heun]", r"sampler is one choice, not a list"),
        ("sampler=xyz", r"There are: consistency, ddim, .*, heun, unipc\.$"),
        ("sampler=grid/uniform", r"sampler=grid/uniform: there is no such choice"),
        ("condition=[text,text]", r"stands twice"),
        ("sampler=ddim,heun", r"need a multirun: python train\.py -m"),
    ],
)
def test_what_is_mistyped_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        check_overrides("train", [argument])


def test_what_is_right_passes():
    check_overrides(
        "train", ["experiment=emoji/text", "optimizer.lr=1", "sampler=heun", "condition=[text,label]", "+data.extra=1"]
    )
    check_overrides("train", ["seed=1,2", "sampler=ddim,heun"], multirun=True)


def test_an_unknown_setting_inside_a_file_is_named():
    with pytest.raises(ValueError, match=r"step: ldm\.sampler\.ddim\.DDIM has no such setting\. Did you mean `steps`"):
        build({"_target_": "ldm.sampler.ddim.DDIM", "step": 3})
    with pytest.raises(ValueError, match=r"steps='many' is of type str.*wants int"):
        build({"_target_": "ldm.sampler.ddim.DDIM", "steps": "many"})
    with pytest.raises(ValueError, match=r"slot='token' .*Label wants Literal\['tokens', 'vector'\]"):
        build({"_target_": "ldm.condition.label.Label", "classes": 3, "width": 4, "slot": "token"})


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "webdataset.gopen", "numpy.load", "torch.load", "ldmx.evil"])
def test_what_is_not_on_the_list_is_not_built(target):
    with pytest.raises(ValueError, match=r"not among what a config may build.*allow=\["):
        build({"a": {"_target_": target, "command": "touch /tmp/owned"}})


def test_a_model_at_rest_may_build_less():
    with pytest.raises(ValueError, match="not among"):
        build({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, NARROW)


def test_the_same_command_finds_its_run_again():
    def run(*overrides):
        return compose_config("train", ["experiment=emoji/text", *overrides]).run_id

    assert run() == run() and run().startswith("emoji/text-") and len(run().rsplit("-", 1)[1]) == 8
    assert run("trainer.max_steps=5", "logger=[csv]", "callback.ema.decay=0.5", "resume=never", "runs=elsewhere") == run()
    assert len({run(o) for o in ["seed=1", "optimizer.lr=0.5", "sampler=heun"]} - {run()}) == 3
    assert run("run_id=mine") == "mine"


def test_a_script_stops_with_one_line():
    command = [sys.executable, "train.py", "experiment=emoji/text", "trainer.max_stepz=3"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "error: trainer.max_stepz: trainer has no `max_stepz`" in answer.stderr


@pytest.mark.parametrize(
    "main, word, wanted",
    [(sample.main, "prompt=fox", "model="), (train.main, "data=shards", r"data\.train="), (precompute.main, "model=m", "out=")],
    ids=["sample", "train", "precompute"],
)
def test_what_must_be_said_is_named(main, word, wanted, tmp_path, monkeypatch):
    """A setting without a default, forgotten: one line that names it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf"^error: .*{wanted}\.\.\. must be said"):
        called(main, word)


def test_several_devices_in_a_multirun_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: trainer\.devices=2 in a multirun.*srun, torchrun"):
        called(train.main, "-m", "experiment=emoji/clip", "seed=1,2", "trainer.devices=2", f"runs={tmp_path}")
