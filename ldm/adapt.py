"""Adapters meet a model: attached to be trained beside it, or put to work on it.

`adapters=[NAME=]SOURCE[:STRENGTH[:TEXT_STRENGTH]][:guess]`, one or a list: NAME is the word of an embedding or the field of a
control picture, SOURCE a run, a folder, a file or hf://org/name, the strengths are 1 where they are not said, and `guess` is a
ControlNet's guess mode.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ldm.check import nearest
from ldm.errors import NotFound, Refusal
from ldm.files.base import difference, identity_of
from ldm.files.folder import from_parts, read_recipe, without_usual
from ldm.files.process import first
from ldm.model import LatentModel

ADAPTED = "ldm.build.adapted"  # the recipe of a model whose adapters alone were trained
WORDS = re.compile(
    r"(?:(?P<name>[^=/:]+)=)?(?P<source>.+?)"
    r"(?::(?P<strength>(?!guess\Z)[^:/]+))?(?::(?P<text>(?!guess\Z)[^:/]+))?(?P<guess>:guess)?",
    re.S,
)
NAMED = re.compile(r"[^=/:]+=")  # how a word begins that names its adapter
NAMES = ("name", "word")  # what NAME= means of an adapter
TEXT = "conditioner."  # where the names of a text's tensors begin


class Adapter(Protocol):
    """Something small that is trained beside a finished model, and put to work on it when that draws.

    It may also be a `Wrapper` or a `Switch`.
    """

    def attach(self, model: LatentModel) -> Sequence[str]:
        """Before training: gives a model, in place, new weights without effect -> the names of what is trained."""

    def owns(self, name: str) -> bool:
        """Whether a trained tensor of that name is its."""

    def apply(self, model: LatentModel, tensors: Mapping[str, Tensor], strength: float, base: Mapping[str, Tensor]) -> None:
        """To draw: puts trained tensors, by the model's names, to work on it, in place; strength 0 changes nothing.

        base: the model's weights before any adapter, on which several depend alike whatever their order; they stay as they are.
        """


@runtime_checkable
class Wrapper(Protocol):
    """An adapter that may put itself around the network."""

    wraps: int  # 0: it does not; 1: around the network, after those that change its own weights; 2: around what is in it, last


@runtime_checkable
class Switch(Protocol):
    """An adapter that may have no strength."""

    scales: bool  # whether strengths other than 0 and 1 mean something for it


def wraps(adapter: Adapter) -> int:
    """Whether an adapter puts itself around the network, and how late."""
    return adapter.wraps if isinstance(adapter, Wrapper) else 0


def scales(adapter: Adapter) -> bool:
    """Whether an adapter can be put to work by a fraction."""
    return not isinstance(adapter, Switch) or adapter.scales


@dataclass(frozen=True)
class Asked:
    """What a person asks for by `adapters=`.

    Args:
        source: a run, a folder, a file, or an address.
        name: of the adapter, if it is given one.
        strength: how much of it is put to work; 1 is all.
        text: the strength of its part for the text tower, if another.
        guess: a ControlNet draws in its guess mode.
    """

    source: str
    name: str | None = None
    strength: float = 1.0
    text: float | None = None
    guess: bool = False


@dataclass(frozen=True)
class Given:
    """What is put to work: adapters by name, their tensors by the model's names, and where they are from."""

    asked: Asked
    adapters: Mapping[str, Adapter]
    tensors: Mapping[str, Tensor]
    sha256: str


def asked(words: str | Sequence[str] | None) -> list[Asked]:
    """What `adapters=` says, each in its order.

    Raises:
        Refusal: a strength that is no number, or two of one name.
    """
    listed = [] if words is None else [words] if isinstance(words, str) else list(words)
    if "" in listed:
        raise Refusal("adapters= names nothing; wanted [NAME=]SOURCE[:STRENGTH], or no adapters= at all.")
    found = [_asked(str(word)) for word in listed]
    for i, one in enumerate(found):
        twin = next((other for other in found[:i] if one.name is not None and other.name == one.name), None)
        if twin is not None:
            raise Refusal(f"adapters: {twin.source} and {one.source} are both called {one.name}; give each a name of its own.")
    return found


def _asked(word: str) -> Asked:
    if Path(word).exists():
        return Asked(word)
    named = NAMED.match(word)
    ends = [len(word), *(i for i in range(len(word), 0, -1) if word[i : i + 1] == ":")]  # a path may have = and : in it
    parts = (word[begin:end] for begin in (0, *([named.end()] if named else [])) for end in ends)
    place = next((part for part in parts if part and Path(part).exists()), None)
    found = WORDS.fullmatch(word if place is None else word.replace(place, "there", 1))
    if found is None:
        raise Refusal(
            f"adapters={word!r}: wanted [NAME=]SOURCE[:STRENGTH[:TEXT_STRENGTH]][:guess], such as style.safetensors:0.8."
        )
    said = {"strength": found["strength"], "text": found["text"]}
    strengths = {name: _number(value) for name, value in said.items() if value is not None}
    if wrong := [said[name] for name, number in strengths.items() if not math.isfinite(number)]:
        raise Refusal(f"adapters={word}: the strength {wrong[0]!r} is no number; wanted SOURCE:0.8, or SOURCE:0.8:0.5.")
    return Asked(place or found["source"], found["name"], **strengths, guess=found["guess"] is not None)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_new(one: Given, others: Sequence[Given]) -> None:
    """Raises Refusal where an adapter is among others already, by the same name."""
    for other in others:
        if (other.sha256, other.asked.name) == (one.sha256, one.asked.name):
            raise Refusal(
                f"adapters: {other.asked.source} and {one.asked.source} are the same. Ask for it once, with the strengths' sum."
            )


def as_asked(adapters: Mapping[str, dict[str, Any]], one: Asked) -> dict[str, dict[str, Any]]:
    """The recipes of adapters, one of which is called NAME, and a ControlNet guesses, where that is asked for.

    Raises:
        Refusal: none of them has a name, or a guess mode.
    """
    nodes = adapters.values()
    if one.name is not None and not any(name in node for node in nodes for name in NAMES):
        raise Refusal(f"adapters={one.name}={one.source}: {', '.join(adapters)} has no name; name it without {one.name}=.")
    if one.guess and not any("guess" in node for node in nodes):
        raise Refusal(f"adapters={one.source}:guess: {', '.join(adapters)} has no guess mode; a ControlNet has.")
    said = {} if one.name is None else dict.fromkeys(NAMES, one.name)
    said |= {"guess": True} if one.guess else {}
    return {name: {k: said.get(k, v) for k, v in node.items()} for name, node in adapters.items()}


def attach(model: LatentModel, adapters: Mapping[str, Adapter], rates: Mapping[str, float]) -> None:
    """Freezes a model and attaches adapters, which alone are trained; without any, the model is trained as it was itself.

    rates: other dropout rates of its conditions, by name.

    Raises:
        Refusal: no such condition; or one that wraps the network beside another.
    """
    for name, rate in rates.items():
        if name not in model.conditioner.embedders:
            raise Refusal(f"rates.{name}: the base has no such condition.{nearest(name, list(model.conditioner.embedders))}")
        model.conditioner.embedders[name].rate = rate
        model.conditioner.check(name, "rates.{}")
    if not adapters:
        return
    wrapping = [name for name, adapter in adapters.items() if wraps(adapter)]
    if wrapping and len(adapters) > 1:
        raise Refusal(f"adapter=[{','.join(adapters)}]: {wrapping[0]} puts itself around the network and is trained alone.")
    model.requires_grad_(False)
    model.trained = frozenset(name for adapter in adapters.values() for name in adapter.attach(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.trained)


def check_base(base: Path) -> None:
    """Raises Refusal where `base` is no whole model at rest."""
    if not (base / "model.safetensors").is_file():
        raise NotFound(
            f"model.init={base}: training=finetune begins from an exported model of ours (config.json, model.safetensors); "
            f"others come by `ldm convert {base} runs/NAME --to ldm`."
        )
    if read_recipe(base).get("_target_") == ADAPTED:
        raise Refusal(
            f"model.init={base} holds adapters, and no whole model. Begin from their base, or merge them into it first: "
            f"ldm convert BASE runs/NAME --to ldm --adapters {base}."
        )


def kept_of(recipe: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """What a run beside a base keeps: which base and which adapters; without adapters, the whole model's own recipe."""
    if recipe["adapters"]:
        return {"_target_": ADAPTED, "base": identity_of(base), "adapters": recipe["adapters"]}
    whole = without_usual(from_parts(read_recipe(base), base))[0]
    for name, rate in recipe["rates"].items():
        whole["condition"][name]["rate"] = rate
    return whole


def base_of(path: str | Path, recipe: Mapping[str, Any], base: Path | None) -> Path:
    """The folder of the base that adapters were trained on.

    Raises:
        Refusal: it is not there, or another is.
    """
    before, place = recipe["base"], Path(base or recipe["base"]["path"])
    other = difference(before, identity_of(place) if (place / "model.safetensors").is_file() else {})
    if other:
        raise Refusal(
            f"{path} was trained on {before['path']}, and in {place} there is another: {other}. Say base=PATH, or put it on "
            f"another model on purpose: model=OTHER adapters={path}."
        )
    if "parts" not in before and first():
        print(f"{path} does not say which autoencoder and text towers its base had: they were not compared.", flush=True)
    return place


def put_on(model: LatentModel, given: Sequence[Given]) -> None:
    """Puts adapters to work on a model, in place, those last that wrap its network.

    Raises:
        Refusal: one does not fit, or a tensor is of no adapter.
    """
    base = model.state_dict()
    model.whole += tuple(one.asked.source for one in given if not any(map(scales, one.adapters.values())))
    work = [(one, name, adapter) for one in given for name, adapter in one.adapters.items()]
    for one in given:
        lost = [n for n in one.tensors if not any(adapter.owns(n) for adapter in one.adapters.values())]
        if lost:
            raise Refusal(f"{one.asked.source}: {len(lost)} tensors are of none of its adapters, such as {lost[0]}.")
        if one.asked.strength not in (0, 1) and one.asked.source in model.whole:
            raise Refusal(
                f"adapters={one.asked.source}:{one.asked.strength:g} is a word, which is there or is not: 1 or 0. Prompts weigh "
                "it: prompt_weights=true prompt='(<word>:0.8)'."
            )
    for one, name, adapter in sorted(work, key=lambda item: wraps(item[2])):
        tensors = {n: x for n, x in one.tensors.items() if adapter.owns(n)}
        try:
            _apply(model, adapter, tensors, one.asked, base)
        except Refusal as error:
            raise Refusal(f"adapters={one.asked.source} ({name}): {error}") from error
    told = [
        {
            "source": one.asked.source,
            "strength": one.asked.strength,
            "text_strength": one.asked.text,
            "guess": one.asked.guess or None,
            "sha256": one.sha256,
        }
        for one in given
    ]
    model.adapters = (*model.adapters, *({k: v for k, v in each.items() if v is not None} for each in told))


def _apply(model: LatentModel, adapter: Adapter, tensors: Mapping[str, Tensor], asked: Asked, base: Mapping[str, Tensor]) -> None:
    if asked.text is None:
        adapter.apply(model, tensors, asked.strength, base)
        return
    if wraps(adapter):
        raise Refusal(f"a second strength ({asked.text:g}) is that of a text, and this has none.")
    adapter.apply(model, {n: x for n, x in tensors.items() if not n.startswith(TEXT)}, asked.strength, base)
    adapter.apply(model, {n: x for n, x in tensors.items() if n.startswith(TEXT)}, asked.text, base)
