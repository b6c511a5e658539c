"""What a run that goes on takes from its checkpoint, and what from its config."""

import copy

import pytest
import torch
from omegaconf import OmegaConf

from helpers.training import diffusion, small, trainer
from ldm.compose import compose_config
from ldm.training.callback.checkpoint import checkpoint_callback
from ldm.training.callback.ema import EMA
from ldm.training.optimizer.muon import Muon
from ldm.training.optimizer.rate import Constant, Linear
from ldm.training.resume import FATES, FREE, HOLDS, Changes, differences, fate, keep_settings, refuse
from ldm.training.run import fit
from ldm.training.saved import resume_from


def plain(config):
    return OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True)


def leg(emoji_root, folder, steps, lr, optimizer=torch.optim.AdamW, config=None, rate=None, **settings):
    """Trains up to a step; the config is what the optimizer is told."""
    stage = diffusion()
    stage.optimizer = lambda params: optimizer(params, lr=lr, **settings)
    stage.rate = rate or Linear(8)
    told = OmegaConf.create(config or {"optimizer": {"lr": lr, **settings}, "trainer": {"max_steps": steps}})
    changes = Changes(OmegaConf.to_yaml(told), plain(told), lambda path: plain(OmegaConf.load(path)), folder)
    callbacks = [checkpoint_callback(str(folder / "checkpoints"), every=2), EMA(0.9), changes]
    fit(stage, small(emoji_root), trainer(folder, steps, callbacks=callbacks), folder)
    return stage.trainer.optimizers[0]


def test_a_rate_and_a_decay_given_anew_hold_and_are_said(emoji_root, tmp_path, capsys):
    """The moments are the checkpoint's; the rate of step 4 is the new one times the schedule's factor there."""
    first = leg(emoji_root, tmp_path, 2, 1e-3, weight_decay=0.5)
    moments = copy.deepcopy(first.state_dict()["state"][0]["exp_avg"])
    second = leg(emoji_root, tmp_path, 4, 1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    group = second.param_groups[0]
    assert group["lr"] == pytest.approx(1e-2 * Linear(8)(4)) and group["betas"] == (0.8, 0.9)
    assert {g["weight_decay"] for g in second.param_groups} == {0.0, 0.1}, "biases and gains are not decayed"
    assert second.state_dict()["state"][0]["step"] == 4 and not torch.equal(moments, second.state_dict()["state"][0]["exp_avg"])
    said, kept = capsys.readouterr().out, (tmp_path / "config.yaml").read_text()
    for line in ("optimizer.lr: 0.01 (before: 0.001), holds from step 2 on", "optimizer.weight_decay: 0.1 (before: 0.5)"):
        assert line in said and f"# step 2: {line}" in kept
    assert OmegaConf.create(kept).optimizer.lr == 1e-2
    leg(emoji_root, tmp_path, 4, 1e-4, weight_decay=0.1)
    assert "not used: optimizer.lr: 0.0001 (before: 0.01)" in capsys.readouterr().out, "nothing was left to train"
    assert (tmp_path / "config.yaml").read_text() == kept


def test_what_is_given_anew_is_what_trains(emoji_root, tmp_path):
    """A rate that changes at step 2 by its own schedule trains the same as one that is given anew there."""

    class Halved(Constant):
        def __call__(self, step):
            return 1.0 if step < 2 else 0.5

    def weights(folder, rates):
        for steps, lr, rate in rates:
            leg(emoji_root, folder, steps, lr, rate=rate)
        return torch.load(folder / "checkpoints" / "step-00000004.ckpt", weights_only=True)["state_dict"]

    whole = weights(tmp_path / "a", [(4, 1e-2, Halved())])
    legs = weights(tmp_path / "b", [(2, 1e-2, Constant()), (4, 5e-3, Constant())])
    assert all(torch.equal(whole[name], legs[name]) for name in whole)


def test_another_optimizer_is_refused_in_our_words(emoji_root, tmp_path):
    """By the config, before anything is touched, and where there is none to compare with, by the checkpoint."""
    config = {"optimizer": {"_target_": "torch.optim.AdamW"}}
    leg(emoji_root, tmp_path, 2, 1e-3, config=config)
    kept = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"cannot change optimizer\._target_: ldm.*Muon \(before: torch.*run_id=NAME"):
        leg(emoji_root, tmp_path, 4, 1e-3, Muon, config={"optimizer": {"_target_": "ldm.training.optimizer.muon.Muon"}})
    assert (tmp_path / "config.yaml").read_text() == kept
    (tmp_path / "config.yaml").unlink()
    for other in (Muon, torch.optim.SGD):
        with pytest.raises(ValueError, match=rf"optimizer is another than this run's {other.__name__}.*config\.yaml"):
            leg(emoji_root, tmp_path, 4, 1e-3, other)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, Muon])
def test_settings_of_an_optimizer_are_the_present_ones(optimizer):
    weights = [torch.nn.Parameter(torch.ones(20, 20)), torch.nn.Parameter(torch.ones(3))]
    old, new = (optimizer(copy.deepcopy(weights), lr=lr, weight_decay=lr) for lr in (0.1, 0.2))
    new.register_load_state_dict_pre_hook(keep_settings)
    wanted = [{k: v for k, v in group.items() if k != "params"} for group in new.param_groups]
    new.load_state_dict(old.state_dict())
    assert [{k: v for k, v in group.items() if k != "params"} for group in new.param_groups] == wanted


BASE = ["experiment=emoji/text", "run_id=x"]


@pytest.fixture(scope="module")
def base():
    return plain(compose_config("train", BASE))


@pytest.mark.parametrize(
    "override, name",
    [
        ("optimizer.lr=1", "optimizer.lr"),
        ("optimizer.betas=[0.1,0.2]", "optimizer.betas"),
        ("rate=constant", "rate._target_"),
        ("seed=7", "seed"),
        ("data.batch=8", "data.batch"),
        ("objective.time.mean=3", "objective.time.mean"),
        ("objective/weight=min_snr", "objective.weight._target_"),
        ("condition.text.rate=0.5", "condition.text.rate"),
        ("callback.ema.decay=0.5", "callback.ema.decay"),
        ("trainer.precision=bf16-mixed", "trainer.precision"),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches"),
        ("always.guard.spike=20", "always.guard.spike"),
        ("loss=lpips", "loss._target_"),
    ],
)
def test_what_holds_is_said(override, name, base):
    changes = list(differences(base, plain(compose_config("train", [*BASE, override]))))
    assert [change[0] for change in changes] == [name] and fate(name) == HOLDS


@pytest.mark.parametrize(
    "override, name",
    [
        ("optimizer=adamw", "optimizer._target_"),
        ("+optimizer.amsgrad=true", "optimizer.amsgrad"),
        ("+groups.decoder={scale: 0.1}", "groups"),
        ("schedule=cosine", "schedule._target_"),
        ("prediction=velocity", "prediction._target_"),
        ("level=timestep", "level"),
        ("backbone.heads=2", "backbone.heads"),
        ("condition=[text,label]", "condition.label"),
        ("condition.text.layers=[-1]", "condition.text.layers"),
        ("autoencoder=identity", "autoencoder._target_"),
        ("training=autoencoding", "training._target_"),
        ("adversary=patchgan", "adversary"),
    ],
)
def test_what_cannot_change_is_refused_by_name(override, name, base, tmp_path):
    changes = list(differences(base, plain(compose_config("train", [*BASE, override]))))
    with pytest.raises(ValueError, match=rf"cannot change .*{name}[._].*|cannot change .*{name}: .*"):
        refuse(changes, tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "override",
    ["logger=[csv]", "runs=elsewhere", "sampler=ddim", "guidance.scale=3", "callback.drawings.every=7", "resume=never"],
)
def test_what_only_watches_is_free(override, base):
    assert {fate(change[0]) for change in differences(base, plain(compose_config("train", [*BASE, override])))} <= {FREE}


def test_a_default_that_was_not_written_is_no_change(base):
    """A config.yaml of before a setting was there is the same run; every line of the table can be met."""
    older = copy.deepcopy(base)
    for config in older:
        del config["condition"]["text"]["dropped"], config["always"]["guard"]["patience"]
    assert not list(differences(older, base)) and not list(differences(base, older))
    assert FATES[-1] == ("*", HOLDS)


def test_a_moved_model_is_the_same_model(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("1" if name == "c" else "0")
    configs = [({"autoencoder": {"path": str(tmp_path / name)}},) * 2 for name in "abc"]
    refuse(list(differences(configs[0], configs[1])), tmp_path)
    with pytest.raises(ValueError, match=r"autoencoder\.path"):
        refuse(list(differences(configs[0], configs[2])), tmp_path)


@pytest.mark.parametrize(
    "setting",
    [{"limit_train_batches": 3}, {"limit_train_batches": 1}, {"overfit_batches": 2}, {"max_epochs": 2}, {"max_steps": -1}],
)
def test_epochs_are_not_counted(setting, emoji_root, tmp_path):
    """Half a batch at the end of an epoch would be half a gradient, and its samples would come again."""
    with pytest.raises(ValueError, match=rf"trainer\.{next(iter(setting))}=.*trainer\.max_steps=N"):
        fit(
            diffusion(),
            small(emoji_root),
            trainer(tmp_path, **{"steps": 2, **setting} if "max_steps" not in setting else {"steps": -1}),
            tmp_path,
        )


def test_a_folder_without_a_checkpoint_is_no_place_to_go_on_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="no good checkpoint"):
        resume_from(str(tmp_path), tmp_path)
