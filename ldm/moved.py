"""Where things have moved to: recipes, checkpoints and configs with old names are read as if they had the new ones.

Whoever moves or renames what a saved model or a user's config may name adds a row here; rows are never taken out.
"""

import re
from collections.abc import Mapping
from typing import Any

# Modules, or things in them, as dotted paths; of those that a `_target_` begins with, the longest counts: {old: new}.
MOVED: dict[str, str] = {}
# Parameters, by the present path of what takes them: {path: {old: new}}.
PARAMETERS: dict[str, dict[str, str]] = {}
# Tensors: pieces of dotted names in a state dict, long enough to be one thing's alone: {old: new}.
TENSORS: dict[str, str] = {}


def moved(node: Any) -> Any:
    """Plain containers with every `_target_`, and the parameters beside it, by their present names."""
    if isinstance(node, list | tuple):
        return [moved(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    node = {key: moved(value) for key, value in node.items()}
    if isinstance(node.get("_target_"), str):
        node["_target_"] = target = moved_path(node["_target_"])
        names = {old: new for old, new in PARAMETERS.get(target, {}).items() if new not in node}
        node = {names.get(key, key): value for key, value in node.items()}
    return node


def moved_path(path: str) -> str:
    """The present name of a dotted path, however often it was moved."""
    for _ in range(len(MOVED)):
        old = max((old for old in MOVED if path == old or path.startswith(f"{old}.")), key=len, default=None)
        if old is None:
            break
        path = MOVED[old] + path.removeprefix(old)
    return path


def moved_names(state: Any) -> Any:
    """A state dict, or containers of such by name, by present names: of all that is no container itself."""
    if not isinstance(state, Mapping):
        return state
    return {key if isinstance(value, Mapping) else _moved_name(key): moved_names(value) for key, value in state.items()}


def _moved_name(name: str) -> str:
    for old, new in TENSORS.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name
