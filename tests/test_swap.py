"""A recipe's settings go with the recipe's choice, and every member of every group can take its place."""

import pytest
from omegaconf import OmegaConf

from ldm.compose import CONFIGS, compose_config
from ldm.errors import Refusal


def test_a_choice_in_a_recipes_place_has_its_own_settings(capsys):
    """The recipe's parts of it and all else stay; what went is said, a rate above all."""
    config = compose_config("train", ["experiment=emoji/text", "optimizer=adamw", "backbone=dit", "backbone.depth=3"])
    own = OmegaConf.load(CONFIGS / "backbone" / "dit.yaml")
    assert OmegaConf.to_container(config.backbone) == {**OmegaConf.to_container(own), "depth": 3}
    assert config.optimizer.lr == OmegaConf.load(CONFIGS / "optimizer" / "adamw.yaml").lr
    assert config.objective.time.mean == 1.25 and config.training.model.backbone == config.backbone
    said = capsys.readouterr().out
    assert (
        "backbone=dit, with its own settings: the recipe's width=32" in said and "lr=0.02, adam_lr=0.003 went with muon" in said
    )


def test_parts_of_a_choice_stay_the_recipes():
    config = compose_config("train", ["experiment=sd/v1", "sampler=heun"])
    assert config.sampler.grid._target_.endswith("Leading") and config.sampler._target_.endswith("Heun")
    config = compose_config("train", ["experiment=emoji/text", "objective/time=uniform"])
    assert config.objective.time == {"_target_": "ldm.objective.time.Uniform"}


def test_the_same_choice_keeps_the_recipes_settings():
    plain, same = (compose_config("train", ["experiment=emoji/text", *more]) for more in ([], ["optimizer=muon"]))
    assert plain.optimizer == same.optimizer and plain.optimizer.lr == 0.02


def test_a_setting_of_the_recipes_choice_is_none_of_another():
    with pytest.raises(Refusal, match=r"backbone has no `mult`"):
        compose_config("train", ["experiment=emoji/class", "backbone=dit", "backbone.mult=[1,2]"])
