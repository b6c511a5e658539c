"""A recipe's settings go with the recipe's choice, and every member of every group can take its place."""

import re

import pytest
from omegaconf import OmegaConf

from helpers.language import save_t5
from helpers.runs import untrained, write_runs
from ldm.build import build_stage
from ldm.compose import CONFIGS, compose_config
from ldm.errors import Refusal
from ldm.nn.empty import weightless


def test_a_choice_in_a_recipes_place_has_its_own_settings(capsys):
    """The recipe's parts of it and all else stay; what went is said, a rate above all."""
    config = compose_config("train", ["experiment=emoji/text", "optimizer=adamw", "backbone=dit", "backbone.depth=3"])
    own = OmegaConf.load(CONFIGS / "backbone" / "dit.yaml")
    assert OmegaConf.to_container(config.backbone) == {**OmegaConf.to_container(own), "depth": 3}
    assert config.optimizer.lr == OmegaConf.load(CONFIGS / "optimizer" / "adamw.yaml").lr
    assert config.objective.time.mean == 1.25 and config.training.model.backbone == config.backbone
    said = capsys.readouterr().out
    assert "backbone=dit, with its own settings: the recipe's width=32" in said
    assert "lr=0.02, adam_lr=0.003 went with muon" in said


def test_a_class_recipe_has_another_network_by_one_word():
    """Its sizes and slots follow from the autoencoder and the condition."""
    words = ["experiment=emoji/class", "backbone=dit", "backbone.depth=1", "autoencoder=identity"]
    with weightless():
        stage = build_stage(compose_config("train", words))
    assert type(stage.model.denoiser.backbone).__name__ == "DiT"


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


# ---- all recipes and all members

GROUPS = ["autoencoder", "backbone", "condition", "schedule", "prediction", "level", "optimizer", "rate", "guidance", "adversary"]
GROUPS += ["objective", "objective/time", "objective/weight", "objective/noise", "objective/distance", "sampler", "sampler/grid"]
RECIPES = sorted(str(p.relative_to(CONFIGS / "experiment").with_suffix("")) for p in (CONFIGS / "experiment").rglob("*.yaml"))
# What cannot be in the nature of things, or for want of another setting, which the refusal names.
REFUSED = [
    "zero terminal SNR",  # of noise alone nothing tells the data
    "listens to|reads tokens",  # a backbone without the slot of a condition, or that needs one
    "tokens of different widths",
    "needs .*guidance",
]


def build_with(recipe, group, name, runs):
    """-> why the recipe's stage cannot be built with another member of a group, or None."""
    word = f"condition=[{name}]" if group == "condition" else f"{group}={name}"
    words = [f"experiment={recipe}", word, f"runs={runs}"]
    if group != "autoencoder" and "autoencoder" not in recipe:
        words.append("autoencoder=identity")  # for want of published weights
    try:
        with weightless():
            build_stage(untrained(compose_config("train", words)))
    except Refusal as refusal:
        return None if any(re.search(reason, str(refusal)) for reason in REFUSED) else f"{word}: {refusal}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_member_takes_the_place_of_a_recipes_own(recipe, group, tmp_path_factory, clip_folder):
    """The full product, a shard for each recipe and group; networks have no numbers."""
    runs = write_runs(tmp_path_factory.mktemp("home") / "runs", clip_folder)
    save_t5(runs / "language")
    members = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    wrong = [why for name in members if (why := build_with(recipe, group, name, runs))]
    assert not wrong, "\n".join(wrong)
