"""What the page shows to write a request with, made from the models: their conditions' inputs, and what is usual."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.adapt import asked
from ldm.embedder import Input
from ldm.model import LatentModel


@dataclass(frozen=True)
class Ready:
    """A model on its device, and how it is usually drawn from: its config's `sampler`, `guidance` and `resolution`, all said."""

    model: LatentModel
    usual: Mapping[str, Any]
    config: Mapping[str, Any]


def inputs_of(model: LatentModel) -> dict[str, Input]:
    """A model's fields, in order, with how a person writes each."""
    readers = {field: e for e in model.conditioner.embedders.values() for field in model.conditioner.fields_of(e)}
    inputs = {field: embedder.input(field) for field, embedder in readers.items()}
    return {field: one for field, one in inputs.items() if one is not None}


def describe(models: Mapping[str, Ready], samplers: Sequence[str], adapters: Sequence[str]) -> dict[str, Any]:
    """Plain values, as JSON takes them.

    Args:
        models: by what `model=` says. A field that several read is written as the first of them has it.
        adapters: what `adapters=` says.
    """
    fields: dict[str, Input] = {}
    for ready in models.values():
        fields = {**inputs_of(ready.model), **fields}
    whole = {source for ready in models.values() for source in ready.model.whole}
    strengths = [{"source": a.source, "strength": a.strength, "whole": a.source in whole} for a in asked(adapters)]
    return {
        "models": [{"name": name, **_usual(ready), "fields": list(inputs_of(ready.model))} for name, ready in models.items()],
        "fields": {field: asdict(one) for field, one in fields.items()},
        "samplers": list(samplers),
        "adapters": strengths,
    }


def _usual(ready: Ready) -> dict[str, Any]:
    sampler, guidance = ready.config["sampler"], ready.config["guidance"]
    return {
        "size": list(ready.config["resolution"]),
        "factor": ready.model.autoencoder.factor,
        "sampler": sampler["_target_"].split(".")[-2],
        "steps": sampler.get("steps"),
        "guidance": guidance.get("scale"),
    }
