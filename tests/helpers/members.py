"""Recipes with another member of a group in the place of their own, built small, and without weights."""

import json
import re
from functools import partial

from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from helpers.language import save_t5
from helpers.runs import untrained, write_runs
from ldm.build import build, build_members, build_stage
from ldm.compose import CONFIGS, compose_config
from ldm.errors import Refusal
from ldm.nn.empty import planned
from ldm.swap import swapped
from ldm.unused import PREVIEWED, check_used

GROUPS = ["autoencoder", "backbone", "condition", "schedule", "prediction", "level", "optimizer", "rate", "guidance", "adversary"]
GROUPS += ["objective", "objective/time", "objective/weight", "objective/noise", "objective/distance", "sampler", "sampler/grid"]
GROUPS += ["loss", "parametrization", "adapter"]
LISTS = ("condition", "adapter")
RECIPES = sorted(str(p.relative_to(CONFIGS / "experiment").with_suffix("")) for p in (CONFIGS / "experiment").rglob("*.yaml"))
SAID = {"scales": {"scales": {"text": 2.0}}, "textual_inversion": {"textual_inversion": {"word": "<fox>", "begin": "fox"}}}
ROW = re.compile(r"^\| `(.+?)` \| .+ \| .+ \|$", re.M)
FEW = {"depth": 8, "single": 1, "res_blocks": 1}  # blocks of a network that is not the one in question
SIZED = ("autoencoder", "backbone", "condition", "objective", "adapter", "parametrization")  # to which the network's sizes matter
SMALL = {"_target_": "ldm.backbone.dit.DiT", "_partial_": True, "size": 8, "width": 16, "depth": 8, "heads": 2}
SEEN = set()  # what was built already
SMALL["vector"] = {"_target_": "ldm.nn.layers.mlp", "_partial_": True}


def members(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def refused():
    """Words of the refusals that docs/concepts.md says lie in the nature of things."""
    page = (CONFIGS.parent / "docs" / "concepts.md").read_text().partition("## What does not go together")[2]
    return ROW.findall(page)


def write_home(runs, clip_folder):
    """runs/quickstart/{clip,autoencoder,diffusion} as recipes expect them, untrained, and runs/language; -> that folder."""
    runs = write_runs(runs, clip_folder)
    for place in ("language", "tiny/t5"):
        save_t5(runs / place)
    text = ["experiment=emoji/text", "condition.text.whiten=false", f"runs={runs}"]
    build_stage(compose_config("train", text)).export(runs / "quickstart" / "diffusion")
    return runs


def config_with(recipe, group, name, runs):
    """The config of `experiment=RECIPE GROUP=NAME`; of what was published, only what needs no download."""
    words = [f"experiment={recipe}", f"runs={runs}", f"model.init={runs}/quickstart/diffusion"]  # a teacher's, an adapter's base
    words += ["autoencoder=identity"] if group != "autoencoder" and "autoencoder" not in recipe and "emoji" not in recipe else []
    said = [words[0], f"{group}=[{name}]" if group in LISTS else f"{group}={name}"]
    overrides = OverridesParser.create().parse_overrides(said)
    if group in LISTS:  # whose members stand in the recipe's place as Hydra composes them; composed once for all
        config = compose_config("train", [*words, f"{group}=[{','.join(members(group))}]"])
        config[group] = {name: config[group][name]}
    else:
        config = compose_config("train", words)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):  # no composing of both, which takes a fifth of a second
            config = swapped(config, "train", overrides, CONFIGS)
    for key, value in SAID.get(name, {}).items():
        OmegaConf.update(config, f"{group}.{key}", value)
    for word, value in SAID["textual_inversion"]["textual_inversion"].items():  # which no recipe can know
        if "textual_inversion" in config.adapter:
            config.adapter.textual_inversion[word] = value
    check_used(config, "train", overrides[1:], CONFIGS)
    return untrained(config)


def shrunken(config, group, runs):
    """The config with small networks in place of those to which the group does not matter."""
    clip = f"local-dir:{runs}/quickstart/clip"
    if group not in SIZED and "DiT" in config.backbone._target_:
        config.backbone = {key: value for key, value in config.backbone.items() if key in ("fuse", "registers")} | SMALL
    elif group != "backbone" and config.backbone.get("fuse") is None:
        for key, count in FEW.items():
            if isinstance(config.backbone.get(key), int):
                config.backbone[key] = min(count, config.backbone[key])
    if group != "condition":
        for condition in config.condition.values():
            for node in (condition, *(condition.get("towers") or {}).values()):
                node.update({"model": clip} if "pretrained" in node and "clip" in str(node.get("_target_")).lower() else {})
    return config


def build_with(recipe, group, name, runs):
    """Builds a recipe's stage with another member of a group, and the member; -> why that cannot be, or None.

    What lies in the nature of things is no reason.
    """
    try:
        config = shrunken(config_with(recipe, group, name, runs), group, runs)
        with planned():
            if group.split("/")[0] in PREVIEWED:
                build(config[group.split("/")[0]])
            elif group != "backbone" or _is_new(config):
                build_stage(config, begins=False)
    except Refusal as refusal:
        return None if any(words in str(refusal) for words in refused()) else f"{recipe}, {group}={name}: {refusal}"
    return None


def _is_new(config):
    """Whether no recipe before had the same network on latents and conditions of the same widths, and the same objective."""
    parts = {"autoencoder": build(config.autoencoder), "condition": build_members(config, "condition")}
    built = [e(autoencoder=parts["autoencoder"]) if isinstance(e, partial) else e for e in parts["condition"].values()]
    backbone = json.dumps(OmegaConf.to_container(config.backbone, resolve=True), sort_keys=True)
    key = (backbone, parts["autoencoder"].channels, tuple(e.widths for e in built), config.objective._target_, config.model.span)
    new = key not in SEEN
    SEEN.add(key)
    return new
