"""Checks a config before anything is built: targets, names and types, each named with the nearest valid one."""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import Refusal

SPECIAL = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


# Targets whose modules import Lightning or open_clip, which takes seconds: a mistake elsewhere is shown before.
SLOW = ("pytorch_lightning", *(f"ldm.training.{part}" for part in ("callback", "logging", "parallel")))
SLOW += tuple(f"ldm.training.stage.{stage}" for stage in ("adversary", "autoencoding", "contrast", "diffusion"))


def check_nodes(node: Any, allow: Sequence[str], place: str = "", later: Sequence[str] = ()) -> None:
    """Walks plain containers; every mapping with `_target_` must fit the signature of what it names.

    Targets below `later` are not looked at.

    Parts that a config offers to all members of a group (objective.time, sampler.grid) are taken out of those that have none.

    Raises:
        Refusal: what was found, what was wanted, and the line to change.
    """
    if isinstance(node, Mapping):
        if "_target_" in node and not _is_below(str(node["_target_"]), later):
            _check_target(node, allow, place or node["_target_"])
        for key, value in list(node.items()):
            check_nodes(value, allow, f"{place}.{key}".strip("."), later)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            check_nodes(value, allow, f"{place}[{i}]", later)
    elif isinstance(node, str) and "${" in node:
        raise Refusal(f"{place}={node}: an interpolation cannot be built from, since it may become anything; write its value.")


def check_counts(**counts: int | None) -> None:
    """Raises Refusal where one of these is below 1; None is none of them."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise Refusal(f"{name}={count}: wanted 1 or more.")


def nearest(word: str, words: Sequence[str]) -> str:
    """' Did you mean ...?' with the nearest valid word, or the words there are."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else f" There are: {', '.join(sorted(words)) or 'none'}."


def _check_target(node: Mapping[str, Any], allow: Sequence[str], place: str) -> None:
    target = node["_target_"]
    if not isinstance(target, str) or not _is_below(target, allow):
        raise Refusal(
            f"{place}._target_={target} is not among what a config may build ({', '.join(allow)}). If you trust that package: "
            f"allow=[{str(target).split('.')[0]}]."
        )
    referent = locate(target, place)
    if not _is_below(f"{getattr(referent, '__module__', '')}.{getattr(referent, '__qualname__', '')}", allow):
        raise Refusal(f"{place}._target_={target} is only imported there from elsewhere; a config may build {', '.join(allow)}.")
    names, open_ended = parameters_of(target, place)
    hints = _hints(referent)
    for key, value in list(node.items()):
        if key in SPECIAL:
            continue
        if key not in names and not open_ended and is_offered(key, value):
            del node[key]
            continue
        if key not in names and not open_ended:
            raise Refusal(f"{place}.{key}: {target} has no such setting.{nearest(key, names)}")
        if key in hints and not _fits(value, hints[key]):
            wanted = str(hints[key]).removeprefix("typing.") if typing.get_args(hints[key]) else hints[key].__name__
            raise Refusal(f"{place}.{key}={value!r} is of type {type(value).__name__}; {target} wants {wanted}.")


def is_offered(key: str, value: Any) -> bool:
    """Whether a setting is a part of ours that the config offers to whatever is chosen, such as objective.time, sampler.grid."""
    target = value.get("_target_") if isinstance(value, Mapping) else None
    return isinstance(target, str) and target.startswith("ldm.") and target.split(".")[2:3] == [key]


def parameters_of(target: str, place: str = "") -> tuple[list[str], bool]:
    """What a dotted path takes by name, and whether it takes whatever it is given besides.

    Raises:
        Refusal: there is no such thing.
    """
    referent = locate(target, place)
    parameters = inspect.signature(referent).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if open_ended:
        parameters = {**_inherited(referent), **parameters}
        open_ended = not _inherited(referent)
    return [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)], open_ended


def _is_below(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def locate(target: str, place: str) -> Any:
    """What a dotted path names.

    Raises:
        Refusal: there is no such thing.
    """
    module, _, name = target.rpartition(".")
    try:
        referent = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Refusal(f"{place}._target_={target}: {error}.") from error
    if not hasattr(referent, name):
        raise Refusal(
            f"{place}._target_={target}: {module} has no {name}.{nearest(name, [n for n in dir(referent) if n[0] != '_'])}"
        )
    return getattr(referent, name)


def _inherited(referent: Any) -> dict[str, inspect.Parameter]:
    """The base class' parameters, where a class passes the rest on to it."""
    bases = [b for b in getattr(referent, "__bases__", ()) if b.__module__.startswith("ldm.")]
    return dict(inspect.signature(bases[0]).parameters) if bases else {}


def _hints(referent: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(referent.__init__ if inspect.isclass(referent) else referent)
    except (NameError, TypeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain number, word or switch is of the hinted type; whatever else is hinted fits."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is type(None):
        return value is None
    return not (origin is None and hint in (list, dict, tuple)) or isinstance(value, hint)
