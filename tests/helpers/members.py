"""Recipes with another member of a group in the place of their own, built without weights."""

import re

from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from helpers.language import save_t5
from helpers.runs import untrained, write_runs
from ldm.build import build, build_stage
from ldm.compose import CONFIGS, compose_config
from ldm.errors import Refusal
from ldm.nn.empty import weightless
from ldm.swap import swapped

GROUPS = ["autoencoder", "backbone", "condition", "schedule", "prediction", "level", "optimizer", "rate", "guidance", "adversary"]
GROUPS += ["objective", "objective/time", "objective/weight", "objective/noise", "objective/distance", "sampler", "sampler/grid"]
RECIPES = sorted(str(p.relative_to(CONFIGS / "experiment").with_suffix("")) for p in (CONFIGS / "experiment").rglob("*.yaml"))
SAID = {"scales": {"scales": {"text": 2.0}}}  # what a choice has no default for
ROW = re.compile(r"^\| `(.+?)` \| .+ \| .+ \|$", re.M)


def members(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def refused():
    """Words of the refusals that docs/concepts.md says lie in the nature of things."""
    page = (CONFIGS.parent / "docs" / "concepts.md").read_text().partition("## What does not go together")[2]
    return ROW.findall(page)


def write_home(runs, clip_folder):
    """runs/quickstart/{clip,autoencoder,diffusion} as recipes expect them, untrained, and runs/language; -> that folder."""
    runs = write_runs(runs, clip_folder)
    save_t5(runs / "language")
    text = ["experiment=emoji/text", "condition.text.whiten=false", f"runs={runs}"]
    build_stage(compose_config("train", text)).export(runs / "quickstart" / "diffusion")
    return runs


def config_with(recipe, group, name, runs):
    """The config of `experiment=RECIPE GROUP=NAME`; of what was published, only what needs no download."""
    words = [f"experiment={recipe}", f"runs={runs}", f"model.init={runs}/quickstart/diffusion"]  # a teacher's, an adapter's base
    words += ["autoencoder=identity"] if group != "autoencoder" and "autoencoder" not in recipe and "emoji" not in recipe else []
    if group == "condition":  # a list, whose members stand in the recipe's place as Hydra composes them; composed once for all
        config = compose_config("train", [*words, f"condition=[{','.join(members(group))}]"])
        config.condition = {name: config.condition[name]}
        return untrained(config)
    config = compose_config("train", words)
    overrides = OverridesParser.create().parse_overrides([words[0], f"{group}={name}"])
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):  # no composing of both, which takes a fifth of a second
        config = swapped(config, "train", overrides, CONFIGS)
    for key, value in SAID.get(name, {}).items():
        OmegaConf.update(config, f"{group}.{key}", value)
    return untrained(config)


def build_with(recipe, group, name, runs):
    """Builds a recipe's stage with another member of a group, and the member; -> why that cannot be, or None.

    What lies in the nature of things is no reason.
    """
    config = config_with(recipe, group, name, runs)
    try:
        with weightless():
            build_stage(config, begins=False)
            if group.split("/")[0] in ("sampler", "guidance"):
                build(config[group.split("/")[0]])
    except Refusal as refusal:
        return None if any(words in str(refusal) for words in refused()) else f"{recipe}, {group}={name}: {refusal}"
    return None
