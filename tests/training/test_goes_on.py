"""A run that goes on with one setting given anew: it holds and is said, or is refused by name; its files say what was done."""

import copy
import shutil

import pytest
from omegaconf import OmegaConf

from ldm.command.train import train
from ldm.compose import compose_config
from ldm.errors import Refusal

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of a run that was copied
COMMON = ["trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.accelerator=cpu", "data.batch=4", "data.size=8"]
COMMON += ["data.groups=[Activities]", "data.val_fraction=0.2", "callback.checkpoint.every=1", "logger=[]", "run_id=x"]
DIFFUSION = ["condition=[label]", "condition.label.width=8", "+data.fields.label=cls", "autoencoder=identity", "backbone=mlp"]
DIFFUSION += ["backbone.size=8", "backbone.width=8", "backbone.depth=1", "callback=[checkpoint,ema]"]
AUTOENCODER = ["training=autoencoding", "autoencoder=kl", "autoencoder.width=8", "autoencoder.mult=[1,2]", "autoencoder.groups=4"]
AUTOENCODER += ["autoencoder.res_blocks=1", "training.perceptual=null", "adversary=patchgan", "adversary.start=0"]
AUTOENCODER += [f"adversary.network.{size}" for size in ("width=8", "layers=1", "groups=4")] + ["callback=[checkpoint,ema]"]


@pytest.fixture(scope="module")
def begun(emoji_root, tmp_path_factory):
    """words -> the config of a run of two steps, made once, and its folder."""
    made = {}

    def of(words):
        if words[0] not in made:
            folder = tmp_path_factory.mktemp("runs")
            config = compose_config("train", [*words, *COMMON, f"data.root={emoji_root}", f"runs={folder}"])
            train(config)
            made[words[0]] = config, folder
        return made[words[0]]

    return of


def go_on(begun, words, folder, setting, value, steps=3):
    """-> the folder of the run, copied and gone on in with one setting given anew."""
    config, before = copy.deepcopy(begun(words)[0]), begun(words)[1]
    shutil.copytree(before, folder, dirs_exist_ok=True)
    config.runs, config.trainer.max_steps = str(folder), steps
    OmegaConf.update(config, setting, value, merge=False, force_add=True)
    train(config)
    return folder / "x"


OWN = {"_target_": "ldm.objective.time.Uniform"}


@pytest.mark.parametrize(
    "setting, value",
    [
        ("condition.label.rate", 0.7),
        ("objective.time", OWN),
        ("optimizer.lr", 0.5),
        ("rate.warmup", 7),
        ("trainer.gradient_clip_val", 0.1),
        ("callback.ema.decay", 0.5),
        ("always.guard.patience", 3),
    ],
)
def test_what_holds_is_said_and_kept(setting, value, begun, tmp_path, capsys):
    folder = go_on(begun, DIFFUSION, tmp_path, setting, value)
    name, new = (f"{setting}._target_", OWN["_target_"]) if value is OWN else (setting, value)
    kept, said = (folder / "config.yaml").read_text(), capsys.readouterr().out
    line = f"{name}: {new} (before: {OmegaConf.select(begun(DIFFUSION)[0], name)}), holds from step 2 on"
    assert line in said and f"# step 2: {line}" in kept
    assert OmegaConf.select(OmegaConf.create(kept), setting) == value


@pytest.mark.parametrize(
    "setting, value, named",
    [
        ("data.size", 16, "data.size: 16 (before: 8)"),
        ("seed", 3, "seed: 3 (before: 0)"),
        ("model.span", 8, "model.span: 8 (before: 0)"),
        ("schedule.shift", 3.0, "schedule.shift: 3.0 (before: 1.0)"),
        ("groups", {"out": {"scale": 0.1}}, "groups: ['out'] (before: [])"),
        ("objective._target_", "ldm.objective.uncertainty.Uncertainty", "objective._target_: ldm.objective.uncertainty"),
        ("objective._target_", "ldm.objective.mean_flow.MeanFlow", "objective._target_: ldm.objective.mean_flow"),
        ("trainer.precision", "64-true", "trainer.precision=64-true: pictures and noise are of 32 bits"),
    ],
)
def test_what_is_refused_is_named_and_nothing_claims_it(setting, value, named, begun, tmp_path):
    """Also where what fails is the first step itself."""
    before = begun(DIFFUSION)[1] / "x"
    with pytest.raises(Refusal) as refused:
        go_on(begun, DIFFUSION, tmp_path, setting, value)
    assert named in str(refused.value)
    for name in ("config.yaml", "config.json"):
        assert (tmp_path / "x" / name).read_text() == (before / name).read_text()


@pytest.mark.parametrize("setting, value", [("condition.label.rate", 0.7), ("sampler._target_", "ldm.sampler.heun.Heun")])
def test_a_finished_run_keeps_what_it_was_trained_with(setting, value, begun, tmp_path, capsys):
    before = begun(DIFFUSION)[1] / "x"
    folder = go_on(begun, DIFFUSION, tmp_path, setting, value, steps=2)
    assert f"not used: {setting}: {value} (before: " in capsys.readouterr().out
    for name in ("config.yaml", "config.json"):
        assert (folder / name).read_text() == (before / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, value",
    [("training.kl_weight", 0.1), ("adversary.weight", 0.1), ("adversary.optimizer.lr", 0.1), ("adversary.start", 5)],
)
def test_what_holds_of_an_autoencoder_and_its_adversary(setting, value, begun, tmp_path, capsys):
    go_on(begun, AUTOENCODER, tmp_path, setting, value)
    assert f"{setting}: {value} (before: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, value", [("adversary.network.width", 16), ("autoencoder.width", 16), ("autoencoder.channels", 3)]
)
def test_what_is_refused_of_an_autoencoder_and_its_adversary(setting, value, begun, tmp_path):
    with pytest.raises(Refusal, match=rf"cannot change {setting}: {value}"):
        go_on(begun, AUTOENCODER, tmp_path, setting, value)
