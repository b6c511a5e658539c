"""A recipe's settings are those of the recipe's own choices: where a command chooses otherwise, they go with what it replaces.

`experiment=emoji/class backbone=dit` takes dit.yaml as it is, and none of the widths and depths that the recipe gives its U-Net;
`optimizer=adamw` does not take over the rate of the recipe's Muon.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.errors import Refusal
from ldm.files.process import first
from ldm.run_id import FILES

# Groups whose settings are the recipe's whatever is chosen: what it trains on and how long, and lists, whose members have names.
KEPT = ("training", "data", "trainer", "condition", "adapter", "metric", "callback", "logger", "set", "hydra", *FILES)


def swapped(config: DictConfig, config_name: str, overrides: Sequence[Override], configs: Path, say: bool = False) -> DictConfig:
    """The composed config, in which a choice of the command has its own file's settings, and the command's, but not the recipe's.

    Args:
        config: composed of `overrides`. Hydra must be initialized.
        config_name: of the command's own file, such as `train`.
        overrides: the words of the command line, parsed by Hydra.
        configs: the folder of the framework's configs.
        say: whether settings that are not taken over are printed.

    Raises:
        Refusal: the command sets what the choice does not have.
    """
    recipe = [o.input_line for o in overrides if o.key_or_group in (*FILES, "hydra.searchpath") and not o.is_sweep_override()]
    if not any(line.startswith(FILES) for line in recipe):
        return config
    choices = {o.key_or_group: o for o in overrides if _is_choice(o, config, configs)}
    if not choices:
        return config
    usual = _composed(config_name, *recipe).hydra.runtime.choices
    for group, override in choices.items():
        if usual.get(group) == override.value() or usual.get(group) is None:
            continue
        place = group.replace("/", ".")
        node = _alone(group, config_name, overrides, usual)
        lost = _lost(OmegaConf.select(config, place), node)
        with open_dict(config):
            for part in _parts(config, place, configs):
                if part not in node or OmegaConf.is_dict(node[part]):
                    node[part] = OmegaConf.select(config, f"{place}.{part}")
            OmegaConf.update(config, place, node, merge=False)
        if say and lost and first():
            print(
                f"{override.input_line}, with its own settings: the recipe's {', '.join(lost)} went with {usual[group]}.",
                flush=True,
            )
    return config


def _composed(config_name: str, *words: str) -> DictConfig:
    return _composed_in(Path.cwd(), config_name, words)


@lru_cache(maxsize=256)
def _composed_in(_: Path, config_name: str, words: tuple[str, ...]) -> DictConfig:
    """Composed once for the same words in the same folder, where `configs` may be searched too."""
    return compose(config_name, overrides=list(words), return_hydra_config=True)


def _is_choice(override: Override, config: DictConfig, configs: Path) -> bool:
    """Whether an override chooses one member of a group that has settings."""
    group = override.key_or_group
    chosen = isinstance(override.value(), str) and not override.is_sweep_override() and not override.is_delete()
    is_group = (configs / group).is_dir() and OmegaConf.is_dict(OmegaConf.select(config, group.replace("/", ".")))
    return chosen and is_group and group.split("/")[0] not in KEPT


def _alone(group: str, config_name: str, overrides: Sequence[Override], usual: Any) -> DictConfig:
    """The group's node by the command's words alone, with the recipe's choices of the groups within it."""
    place = group.replace("/", ".")
    within = {g: name for g, name in usual.items() if str(g).startswith(f"{group}/") and name is not None}
    words = [f"{g}={name}" for g, name in within.items() if not any(o.key_or_group == g for o in overrides)]
    heads = (f"{place}.", f"{group}/")
    said = [o for o in overrides if o.key_or_group in (group, "hydra.searchpath") or o.key_or_group.startswith(heads)]
    words += [o.input_line for o in said if not o.is_delete()]
    try:
        config = deepcopy(_composed(config_name, *words))
    except HydraException as error:
        raise Refusal(f"{group}: {error}") from error
    for o in said:
        parent, _, key = o.key_or_group.rpartition(".")
        if o.is_delete() and parent:  # perhaps of what the recipe gave, and is not there any more
            with open_dict(config):
                (OmegaConf.select(config, parent) or {}).pop(key, None)
    return OmegaConf.select(config, place)


def _parts(config: DictConfig, place: str, configs: Path) -> list[str]:
    """The groups within a group, as keys of its node: the recipe's settings of theirs stay."""
    folder = configs / place.replace(".", "/")
    return [
        path.name for path in folder.iterdir() if path.is_dir() and OmegaConf.select(config, f"{place}.{path.name}") is not None
    ]


def _lost(before: DictConfig, after: DictConfig) -> list[str]:
    """What was set, and is so no longer."""
    before, after = (OmegaConf.to_container(node, resolve=False) for node in (before, after))
    return [f"{k}={v}" for k, v in before.items() if not isinstance(v, dict) and (k not in after or after[k] != v)]
