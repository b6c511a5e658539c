"""Old names of what has moved: recipes, checkpoints and configs with them are read as if they had the present ones.

Whoever moves or renames something that a saved model or a user's config may name adds a row here; rows are never removed.
"""

import re
from collections.abc import Mapping
from typing import Any

# Modules, or things in them, as dotted paths; of those that a `_target_` begins with, the longest counts: {old: new}.
MOVED: dict[str, str] = {
    "ldm.clip": "ldm.tower.clip",
    "ldm.condition.conditioner": "ldm.conditioner",
    "ldm.condition.degrade": "ldm.condition._degrade",
    "ldm.condition.files": "ldm.condition._files",
    "ldm.condition.masks": "ldm.condition._masks",
    "ldm.data.ahead": "ldm.data.batch.ahead",
    "ldm.data.bad": "ldm.data.batch.bad",
    "ldm.data.bucket": "ldm.data.order.bucket",
    "ldm.data.cut": "ldm.data.batch.cut",
    "ldm.data.decode": "ldm.data.shard.decode",
    "ldm.data.fetch": "ldm.data.shard.fetch",
    "ldm.data.filter": "ldm.data.order.filter",
    "ldm.data.index": "ldm.data.shard.index",
    "ldm.data.latents": "ldm.data.batch.latents",
    "ldm.data.recent": "ldm.data.shard.recent",
    "ldm.data.record": "ldm.data.shard.record",
    "ldm.data.repair": "ldm.data.shard.repair",
    "ldm.data.samples": "ldm.data.batch.samples",
    "ldm.data.selection": "ldm.data.shard.selection",
    "ldm.data.settings": "ldm.data._settings",
    "ldm.data.source": "ldm.data.shard.source",
    "ldm.data.tar": "ldm.data.shard.tar",
    "ldm.data.write": "ldm.data.shard.write",
    "ldm.edit": "ldm.drawing.edit",
    "ldm.evaluation.sweep": "ldm.report.sweep",
    "ldm.extractor.weights": "ldm.extractor._weights",
    "ldm.folder": "ldm.files.folder",
    "ldm.generate": "ldm.drawing.generate",
    "ldm.metric.colours": "ldm.metric._colours",
    "ldm.metric.pairs": "ldm.metric._pairs",
    "ldm.request": "ldm.drawing.request",
    "ldm.sampler.noise": "ldm.sampler._noise",
    "ldm.training.adversary": "ldm.training.stage.adversary",
    "ldm.training.augment": "ldm.training.stage.augment",
    "ldm.training.autoencoding": "ldm.training.stage.autoencoding",
    "ldm.training.bfloat16": "ldm.training.callback.bfloat16",
    "ldm.training.checkpoint": "ldm.training.callback.checkpoint",
    "ldm.training.compile": "ldm.training.callback.compile",
    "ldm.training.contrast": "ldm.training.stage.contrast",
    "ldm.training.diffusion": "ldm.training.stage.diffusion",
    "ldm.training.ema": "ldm.training.callback.ema",
    "ldm.training.evaluate": "ldm.training.callback.evaluate",
    "ldm.training.groups": "ldm.training.optimizer.groups",
    "ldm.training.guard": "ldm.training.callback.guard",
    "ldm.training.latents": "ldm.training.callback.latents",
    "ldm.training.layout": "ldm.training.parallel.layout",
    "ldm.training.levels": "ldm.training.callback.levels",
    "ldm.training.muon": "ldm.training.optimizer.muon",
    "ldm.training.power_ema": "ldm.training.callback.power_ema",
    "ldm.training.preempt": "ldm.training.callback.preempt",
    "ldm.training.preview": "ldm.training.callback.preview",
    "ldm.training.profile": "ldm.training.callback.profile",
    "ldm.training.rate": "ldm.training.optimizer.rate",
    "ldm.training.recompute": "ldm.training.callback.recompute",
    "ldm.training.sharded": "ldm.training.parallel.sharded",
    "ldm.training.throughput": "ldm.training.callback.throughput",
    "pytorch_lightning.callbacks.TQDMProgressBar": "ldm.training.callback.bar.Bar",
}
# Parameters, by the present path of what takes them: {path: {old: new}}.
PARAMETERS: dict[str, dict[str, str]] = {}
# Tensors: pieces of dotted names in a state dict, long enough to be one thing's alone: {old: new}.
TENSORS: dict[str, str] = {}


def moved(node: Any) -> Any:
    """-> plain containers in which every `_target_`, and the parameters beside it, have their present names."""
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
    """-> the present name of a dotted path, however often it was moved."""
    for _ in range(len(MOVED)):
        old = max((old for old in MOVED if path == old or path.startswith(f"{old}.")), key=len, default=None)
        if old is None:
            break
        path = MOVED[old] + path.removeprefix(old)
    return path


def moved_names(state: Any) -> Any:
    """-> a state dict, or containers of state dicts, in which tensors have their present names."""
    if not isinstance(state, Mapping):
        return state
    return {key if isinstance(value, Mapping) else _moved_name(key): moved_names(value) for key, value in state.items()}


def _moved_name(name: str) -> str:
    for old, new in TENSORS.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name
