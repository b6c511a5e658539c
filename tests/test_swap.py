"""A recipe's settings go with the recipe's choice, and every member of every group can take its place."""

import pytest
from omegaconf import OmegaConf

from helpers.members import GROUPS, RECIPES, build_with, members, refused, write_home
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip_folder):
    return write_home(tmp_path_factory.mktemp("home") / "runs", clip_folder)


@pytest.mark.parametrize("group", GROUPS)
def test_every_member_builds_once_in_one_recipe(group, runs):
    """Autoencoders that are trained, and what fights them, in the autoencoder's; all else in the text model's."""
    for name in members(group):
        trained = group == "adversary" or (group == "autoencoder" and name.startswith(("kl", "vq", "rae")))
        assert build_with("emoji/autoencoder_gan" if trained else "emoji/text", group, name, runs) is None


def test_what_is_listed_as_refused_is():
    """The table says words of messages that the code has."""
    code = "".join(path.read_text() for path in (CONFIGS.parent / "ldm").rglob("*.py"))
    assert len(refused()) > 3 and not [words for words in refused() if words not in code]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_a_member_of_every_group(recipe, runs):
    """Each recipe another one, so that over all recipes nearly every member is met: 15 times fewer than the full product."""
    chosen = [(group, members(group), RECIPES.index(recipe) + i) for i, group in enumerate(GROUPS)]
    wrong = [why for group, names, i in chosen if (why := build_with(recipe, group, names[i % len(names)], runs))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_member_takes_the_place_of_a_recipes_own(recipe, group, runs):
    """The full product, a shard for each recipe and group; networks have no numbers."""
    wrong = [why for name in members(group) if (why := build_with(recipe, group, name, runs))]
    assert not wrong, "\n".join(wrong)
