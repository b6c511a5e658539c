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
    takers = _takers(locate(target, place))
    parameters = [p for taker in reversed(takers) for p in inspect.signature(taker).parameters.values()]
    names = dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    return list(names), _is_open(takers[-1])


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


def _takers(referent: Any) -> list[Any]:
    """What is built, and the base classes of ours to which each in turn passes on what it takes besides."""
    takers = [referent]
    while _is_open(takers[-1]):
        bases = [base for base in getattr(takers[-1], "__bases__", ()) if base.__module__.startswith("ldm.")]
        if not bases:
            break
        takers.append(bases[0])
    return takers


def _is_open(referent: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(referent).parameters.values())


def _hints(referent: Any) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for taker in reversed(_takers(referent)):
        try:
            hints |= typing.get_type_hints(taker.__init__ if inspect.isclass(taker) else taker)
        except (NameError, TypeError):
            continue
    return hints


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
