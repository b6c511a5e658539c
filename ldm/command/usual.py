"""How a model is drawn from where the command does not say it: as its config.json's `usual` has it, or as models are drawn here.

`null` on the command line means usual: a sampler, its grid, a guidance, or one of their settings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.check import check_nodes
from ldm.compose import CONFIGS

SAMPLER, GRID, GUIDANCE = "sampler/dpmpp", "sampler/grid/uniform", "guidance/cfg"  # where a model does not say it


def as_usual(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config of sample.yaml or evaluate.yaml, and a model's `usual` -> the same; its sampler, grid and guidance are said.

    One that is built already stays as it is. A chosen sampler takes the model's steps and grid where it does not say its own, and
    a setting that the model's own has not is one of what models are drawn with here.

    Raises:
        Refusal: the model's `usual` names something else than a sampler or a guidance.
    """
    for name in ("sampler", "guidance"):  # a model, perhaps a stranger's, chooses among these alone
        allowed = ("ldm.sampler", "ldm.guidance", *(config.get("allow") or ()))
        check_nodes(_taken(config[name], usual.get(name)), allowed, f"usual.{name}")
    defaults = {"sampler": {**_plain(SAMPLER), "grid": _plain(GRID)}, "guidance": _plain(GUIDANCE)}
    return {**config, **{name: _filled(config[name], usual.get(name), default) for name, default in defaults.items()}}


def check_drawing(config: Mapping[str, Any], usual: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Names a mistake in a setting of the sampler or the guidance, before a model is loaded to be drawn from."""
    drawn = as_usual(config, usual)
    check_nodes({name: drawn[name] for name in ("sampler", "guidance")}, allow)


def drawn_as(config: DictConfig) -> dict[str, Any]:
    """A composed train.yaml -> the sampler and guidance of its previews, for `usual`, but for one that needs another model."""
    nodes = {name: OmegaConf.to_container(config[name], resolve=True) for name in ("sampler", "guidance") if config.get(name)}
    return {name: node for name, node in nodes.items() if "_target_" in node and not _needs_another(node)}


def _needs_another(node: Any) -> bool:
    """Whether another model is built within a guidance."""
    return isinstance(node, Mapping) and ("path" in (node.get("weak") or {}) or any(map(_needs_another, node.values())))


def _taken(said: Any, usual: Any) -> Any:
    """What of a model's usual sampler or guidance is taken beside what is said."""
    if not isinstance(usual, Mapping) or (said is not None and not isinstance(said, Mapping)):
        return None if isinstance(usual, Mapping) else usual
    return usual.get("grid") if (said or {}).get("_target_") not in (None, usual.get("_target_")) else usual


def _filled(said: Any, usual: Mapping[str, Any] | None, default: Mapping[str, Any]) -> Any:
    """What is said, and what is usual, or else the default, in the place of each null."""
    if said is not None and not isinstance(said, Mapping):
        return said
    said = {name: value for name, value in (said or {}).items() if value is not None}
    basis = default if usual is None else usual
    grid = said.get("grid") or {}
    if "_target_" not in grid and grid.values():  # settings of the grid that is usual
        said["grid"] = {**(basis.get("grid") or default["grid"]), **{n: value for n, value in grid.items() if value is not None}}
    if said.get("_target_") not in (None, basis["_target_"]):
        return {**{name: basis[name] for name in ("steps", "grid") if name in basis}, **said}
    return {**(basis if said.keys() <= {*basis, "_target_"} else default), **said}


def _plain(file: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{file}.yaml"))
