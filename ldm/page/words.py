"""From what the page sends to words of the command line: what is drawn, and the command that draws it again, are the same."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.adapt import Asked, asked
from ldm.check import nearest
from ldm.compose import spoken
from ldm.embedder import Input
from ldm.errors import Refusal
from ldm.files.called import command_line

# What a page may ask for: word, least, most, whether it is an integer.
NUMBERS = {
    "seed": ("seed", 0, 2**53, True),
    "count": ("count", 1, 64, True),
    "batch": ("batch", 1, 64, True),
    "steps": ("sampler.steps", 1, 1000, True),
    "guidance": ("guidance.scale", -100, 100, False),
    "strength": ("strength", 0, 1, False),
}
SIDE = 4096  # pixels, at most
LENGTH = 20_000  # characters of a text, at most
OTHERS = ("models", "prompt", "negative", "sampler", "width", "height", "adapters", "ask")
UNWRITTEN = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]+")  # signs that no line of a shell holds


def words_of(
    said: Mapping[str, Any], files: Mapping[str, Path], inputs: Mapping[str, Input], samplers: Sequence[str]
) -> list[str]:
    """What the page sends for one model -> words of sample.yaml, all but its model and adapters.

    Args:
        said: seed, count, batch, steps, guidance, strength, prompt, negative, sampler, width, height, ask; null is usual.
        files: what was uploaded or painted, kept as files: `init`, `mask` and `ask.FIELD`.
        inputs: how the model's fields are written; what is said for others is left out, since it is for the model beside it.

    Raises:
        Refusal: something is not known, no number, or out of its bounds.
    """
    if unknown := said.keys() - {*NUMBERS, *OTHERS}:
        raise Refusal(f"{sorted(unknown)[0]}: the page asks for no such thing.{nearest(sorted(unknown)[0], [*NUMBERS, *OTHERS])}")
    words = []
    if "caption" in inputs:
        words.append(f"prompt={spoken(_text('prompt', said.get('prompt') or ''))}")
        negative = _text("negative", said.get("negative") or "")
        words += [f"negative={spoken(negative)}"] if negative else []
    words += _asked(asked_of(said), files, inputs)
    words += [f"{name}={spoken(str(files[name]))}" for name in ("init", "mask") if name in files]
    if (sampler := said.get("sampler")) is not None:
        if sampler not in samplers:
            raise Refusal(f"sampler={sampler}: there is no such choice.{nearest(str(sampler), samplers)}")
        words.append(f"sampler={sampler}")
    given = {name: said[name] for name in NUMBERS if said.get(name) is not None}
    if "init" not in files:  # which alone it goes with
        given.pop("strength", None)
    words += [f"{NUMBERS[name][0]}={number(name, value, *NUMBERS[name][1:])}" for name, value in given.items()]
    return words + _size(said.get("height"), said.get("width"))


def asked_of(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said for the conditions, by field.

    Raises:
        Refusal: it is something else.
    """
    ask = said.get("ask") or {}
    if not isinstance(ask, Mapping):
        raise Refusal(f"ask: wanted values by field, and {json.dumps(ask)[:40]} was sent.")
    return ask


def command_of(words: Sequence[str]) -> str:
    """Words of sample.yaml -> the command, as a shell takes it and as this one was called."""
    return f"{command_line('sample')} {' '.join(map(_quoted, words))}"


def strengths(adapters: Sequence[str], said: Sequence[Any]) -> list[str]:
    """What `adapters=` says, each at the strength that the page sends for it.

    Raises:
        Refusal: as many strengths were not sent, or one is out of bounds.
    """
    if not isinstance(said, list) or len(said) != len(adapters):
        raise Refusal(f"adapters: {len(adapters)} strengths are wanted, and {said} was sent.")
    pairs = zip(adapters, asked(adapters), said)
    return [_at(word, one, number("strength", value, -10, 10)) for word, one, value in pairs]


def number(name: str, value: Any, low: float | None, high: float | None, whole: bool = False) -> int | float:
    """A number that was sent, within its bounds.

    Args:
        name: of it, for errors.
        value: what was sent.
        low, high: its bounds, both allowed; None for none.
        whole: only integers are wanted.

    Raises:
        Refusal: it is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (-1e300 if low is None else low) <= value <= (1e300 if high is None else high):
        bounds = "" if low is None or high is None else f" from {low:g} to {high:g}"
        raise Refusal(f"{name}={str(value)[:40]}: wanted a number{bounds}.")
    if whole and value != int(value):
        raise Refusal(f"{name}={value}: wanted a whole number.")
    return int(value) if whole else value


def _at(word: str, one: Asked, strength: float) -> str:
    if strength == one.strength:
        return word
    name, text = ("" if one.name is None else f"{one.name}="), ("" if one.text is None else f":{one.text!r}")
    return f"{name}{one.source}:{strength!r}{text}{':guess' if one.guess else ''}"


def _asked(ask: Mapping[str, Any], files: Mapping[str, Path], inputs: Mapping[str, Input]) -> list[str]:
    """What is said for the other conditions -> ask.FIELD=..."""
    words = []
    for field, one in inputs.items():
        if f"ask.{field}" in files:
            words.append(f"ask.{field}={spoken(str(files[f'ask.{field}']))}")
        elif field != "caption" and ask.get(field) is not None:
            words.append(f"ask.{field}={_value(field, ask[field], one)}")
    return words


def _value(field: str, value: Any, one: Input) -> Any:
    if one.kind == "number":
        return number(f"ask.{field}", value, one.low, one.high, one.whole)
    if one.kind == "choice":
        if value not in one.names:
            raise Refusal(f"ask.{field}={str(value)[:40]}: there is no such choice.{nearest(str(value), one.names)}")
        return spoken(value)
    if one.kind == "text":
        return spoken(_text(f"ask.{field}", value))
    raise Refusal(f"ask.{field}: wanted a {one.kind}, and {str(value)[:40]} was sent.")


def _size(height: Any, width: Any) -> list[str]:
    if (height is None) != (width is None):
        raise Refusal(f"width={width} height={height}: say both, or none for the usual size.")
    if height is None:
        return []
    return [f"resolution=[{number('height', height, 1, SIDE, True)},{number('width', width, 1, SIDE, True)}]"]


def _text(name: str, value: Any) -> str:
    """A text as one line, without signs that a shell's line does not hold."""
    if not isinstance(value, str) or len(value) > LENGTH:
        raise Refusal(f"{name}: wanted a text of at most {LENGTH} characters.")
    return UNWRITTEN.sub(" ", value).strip()


def _quoted(word: str) -> str:
    """key=value for a shell, with the quotes, where there must be any, around the value."""
    key, sign, value = word.partition("=")
    return f"{key}{sign}{shlex.quote(value)}" if value else word
