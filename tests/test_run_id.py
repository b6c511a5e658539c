"""The same command finds its run again, and no other."""

import shutil
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ldm.command.train import train
from ldm.compose import CONFIGS, check_overrides, compose_config
from ldm.files import moved as table
from ldm.files.folder import FORMAT, read_json, write_text
from ldm.run_id import differences, identity
from ldm.training.saved import read_checkpoint

BEFORE = Path(__file__).parent / "data" / "format0" / "trained"
OLD = "emoji/class-aa02e5b9"
COMMAND = (
    "experiment=emoji/class data=emoji data.groups=[Activities] data.batch=4 data.size=8 data.root=f0/emoji autoencoder=identity "
    "backbone=mlp backbone.size=8 backbone.width=4 condition.label.width=4 ~backbone.mult ~backbone.res_blocks ~backbone.groups "
    "~backbone.heads backbone.depth=1"
).split()


def digits(*overrides, swept=(), configs=CONFIGS):
    return identity(OverridesParser.create().parse_overrides(list(overrides)), configs, swept)


def begin(config):
    """What train.py leaves first."""
    write_text(OmegaConf.to_yaml(config), Path(config.folder) / "config.yaml")
    return Path(config.folder) / "config.yaml"


def test_only_trainings_have_an_identity(tmp_path):
    for name in ("sample", "evaluate", "precompute"):
        assert "identity" not in compose_config(name, ["model=m", f"runs={tmp_path}"] if name != "sample" else ["model=m"])


def test_digits_are_of_what_is_said():
    assert digits("seed=1", "optimizer.lr=1e-3") == digits("optimizer.lr=0.001", "seed=1")
    said = [
        "seed=1",
        "seed=2",
        "~seed",
        "seed=null",
        "backbone=dit",
        "allow=[mine]",
        "a.b='1'",
        "a.b=1",
    ]
    assert len({digits(o) for o in said} | {digits()}) == len(said) + 1
    unsaid = [
        "trainer=ddp",
        "trainer.max_steps=3",
        "callback@always=[guard]",
        "logger.csv.x=1",
        "resume=never",
        "hydra.verbose=true",
        "hydra.searchpath=[file://configs]",
    ]
    assert {digits(o) for o in unsaid} == {digits()}
    assert digits("trainer.max_steps=3", swept=["trainer.max_steps"]) != digits(
        "trainer.max_steps=4", swept=["trainer.max_steps"]
    )


def test_digits_are_of_the_experiments_files_and_of_no_other(tmp_path):
    """A new default changes nothing; an experiment's words, or those of one that it begins with, do; a moved class does not."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    chosen, first = ["experiment=laion/kl_f4", "size=tiny"], digits("experiment=laion/kl_f4", "size=tiny")

    def changed(name, old, new):
        path = tmp_path / "configs" / f"{name}.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        found = digits(*chosen, configs=tmp_path / "configs")
        path.write_text(text)
        return found

    assert changed("optimizer/adamw", "lr", "rate") == changed("train", "seed: 0", "seed: 0\nnovelty: 1") == first
    assert first not in (
        changed("experiment/laion/kl_f4", "6.3e-8", "1e-8"),
        changed("experiment/laion/kl_f8", "laion/kl_f8", "b"),
    )
    assert changed("experiment/laion/kl_f4", "# @package", "# another comment\n# @package") == first
    chosen, first = ["experiment=dit/xl_2"], digits("experiment=dit/xl_2")
    assert changed("experiment/dit/xl_2", "ldm.nn.layers.identity", "ldm.elsewhere.identity") == first
    assert changed("experiment/dit/xl_2", "ldm.nn.layers.identity", "ldm.nn.layers.mlp") != first


def test_experiments_of_the_users_own_count(tmp_path):
    path = tmp_path / "experiment" / "mine.yaml"
    write_text("# @package _global_\nname: mine\nseed: 1\n", path)
    search = [f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine"]
    config = compose_config("train", [*search, f"runs={tmp_path}"])
    write_text("# @package _global_\nname: mine\nseed: 2\n", path)
    assert config.run_id == f"mine-{config.identity}" and digits(*search) != config.identity


@pytest.mark.parametrize("named", [[], ["run_id=mine"]], ids=["digits", "named"])
def test_a_changed_default_keeps_the_runs_value(named, tmp_path, capsys):
    command = ["experiment=emoji/class", "optimizer.lr=0.5", f"runs={tmp_path}", *named]
    config = compose_config("train", command)
    path = begin(config)
    saved = OmegaConf.load(path)
    saved.seed, saved.prediction = 7, {"_target_": "ldm.prediction.Elder", "gone": 1}  # the defaults of that time
    saved.trainer.max_steps, saved.data.relic = 12, 3
    del saved.backbone["middle_depth"]
    path.write_text(OmegaConf.to_yaml(saved))
    capsys.readouterr()
    again = compose_config("train", [*command, "trainer.max_steps=99"])
    assert again.run_id == config.run_id and (again.seed, again.trainer.max_steps) == (7, 99)
    assert again.prediction == {"_target_": "ldm.prediction.Elder", "gone": 1} and again.training.seed == 7
    said = capsys.readouterr().out
    for line in (
        "seed=7 is kept; the default is 0 now",
        "backbone.middle_depth=1 is new since",
        "data.relic=3 is a setting no longer",
    ):
        assert f"  {line}\n" in said
    assert "max_steps" not in said
    assert compose_config("train", [*command, "resume=never"]).seed == 0
    if named:
        assert compose_config("train", [*command, "optimizer.lr=0.25"]).seed == 0, "another command says what it says"


def test_a_moved_class_is_no_changed_default(tmp_path, capsys, monkeypatch):
    path = begin(compose_config("train", [f"runs={tmp_path}"]))
    path.write_text(path.read_text().replace("ldm.backbone.unet.UNet", "ldm.backbone.ushape.UNet"))
    monkeypatch.setitem(table.MOVED, "ldm.backbone.ushape", "ldm.backbone.unet")
    capsys.readouterr()
    compose_config("train", [f"runs={tmp_path}"])
    assert not capsys.readouterr().out


# ---- runs of before the digits were of the command


@pytest.fixture
def runs(tmp_path):
    shutil.copytree(BEFORE, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_of_before_is_found_by_its_config(runs, capsys):
    """Also when a default has been added since, and again once it has been begun anew with it."""
    first = compose_config("train", [*COMMAND, f"runs={runs}"])
    assert first.run_id == OLD and first.folder == f"{runs}/{OLD}"
    saved = OmegaConf.load(runs / OLD / "config.yaml")
    del saved.profile, saved.optimizer["weight_decay"]
    (runs / OLD / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    capsys.readouterr()
    config = compose_config("train", [*COMMAND, f"runs={runs}"])
    assert config.run_id == OLD and "optimizer.weight_decay=0.0 is new since" in capsys.readouterr().out
    begin(config)
    assert compose_config("train", [*COMMAND, f"runs={runs}"]).run_id == OLD
    assert compose_config("train", [*COMMAND, f"runs={runs}", "seed=3"]).run_id != OLD
    assert compose_config("train", [*COMMAND, f"runs={runs}", "resume=never"]).run_id == f"emoji/class-{config.identity}"


def test_a_run_of_before_that_may_be_it_is_named(runs, capsys):
    config = compose_config("train", [*COMMAND, f"runs={runs}", "seed=3"])
    said = capsys.readouterr().out
    assert config.run_id != OLD and f"differs from this command in seed (0 there, 3 here). run_id={OLD} goes on with it" in said
    saved = OmegaConf.load(runs / OLD / "config.yaml")
    del saved.optimizer["weight_decay"]
    (runs / OLD / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    assert compose_config("train", [*COMMAND, f"runs={runs}", "optimizer.weight_decay=0"]).run_id != OLD


def test_a_checkpoint_of_before_goes_on(runs, emoji_root):
    command = [*COMMAND, f"data.root={emoji_root}", f"run_id={OLD}", f"runs={runs}", "logger=[]", "trainer.val_check_interval=3"]
    folder = train(
        compose_config("train", [*command, "callback=[checkpoint,ema]", "callback.ema.decay=0.5", "trainer.max_steps=3"])
    )
    first, last = (read_checkpoint(folder / "checkpoints" / f"step-0000000{n}.ckpt") for n in (2, 3))
    assert (first.get("format"), last["format"], last["global_step"]) == (None, FORMAT, 3) and read_json(folder / "config.json")
    before, after = (c["callbacks"]["EMA"]["average"]["model.denoiser.backbone.inp.weight"] for c in (first, last))
    assert last["callbacks"]["EMA"]["updates"] == 3 and 0 < (before - after).norm() < before.norm() / 2


# ---- multirun


def test_jobs_of_a_multirun_that_would_meet_are_refused():
    assert check_overrides("train", ["seed=1,2", "run_id='a-${seed}'"], multirun=True) == ["seed"]
    for word, message in {
        "run_id=mine": r"run_id=mine in a multirun.*NAME-\$\{seed\}",
        "optimizer.lr=1,1": "stands twice",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_overrides("train", ["seed=1,2", word], multirun=True)


def test_differences_are_of_settings_and_of_nodes():
    a = {"x": {"_target_": "A", "n": 1}, "y": {"_target_": "B", "n": 1, "old": 0}, "z": [1, 2]}
    b = {"x": {"_target_": "C", "m": 1}, "y": {"_target_": "B", "n": 2, "new": 0}, "z": [1, 2]}
    assert [place for place, _, _ in differences(a, b)] == [("x",), ("y", "n"), ("y", "old"), ("y", "new")]
