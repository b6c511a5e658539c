r"""Prompts with weights, in the syntax of AUTOMATIC1111's web UI (its wiki, Features: Attention/emphasis, Alternating words).

(word)       weight 1.1; ((word)) 1.21
(word:1.3)   weight 1.3
[word]       weight 1 / 1.1
[cat|dog]    cat and dog alternate, one a step
\( \) \[ \]  the signs themselves
A bracket that is not closed goes to the end. The web UI's changes at a step, [from:to:when], and BREAK are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from ldm.embedder import Weighted
from ldm.errors import Refusal
from ldm.types import Batch, Conditioned, Denoise, Guidance

STEP = 1.1  # of one pair of brackets
MOST = 64  # captions that take turns
SIGNS = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
CHANGE = re.compile(r"\[[^\[\]]*:\s*[\d.]+\s*\]")


def weighted(prompt: str) -> Weighted:
    """A prompt -> its plain text, with its parts' weights and the captions that alternate.

    Raises:
        Refusal: it has a syntax that is not supported, or too many captions alternate.
    """
    if CHANGE.search(prompt) or re.search(r"\bBREAK\b", prompt):
        raise Refusal(
            f"prompt={prompt!r}: prompt_weights=true knows weights and [a|b], no [from:to:when] and no BREAK. Leave them out."
        )
    turns = in_turns(prompt)
    first, *others = (_plain(parts_of(turn)) for turn in turns)
    first.turns = (first, *others) if others else ()
    return first


def parts_of(text: str) -> list[tuple[str, float]]:
    """Text without alternatives -> its parts, each with its weight; neighbours of equal weight are one part."""
    parts: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(first: int, factor: float) -> None:
        for part in parts[first:]:
            part[1] *= factor

    for sign in SIGNS.finditer(text):
        said, number = sign[0], sign[1]
        if said.startswith("\\") and len(said) == 2:
            parts.append([said[1], 1.0])
        elif said in opened:
            opened[said].append(len(parts))
        elif number is not None and opened["("]:
            weigh(opened["("].pop(), _number(number, text))
        elif said == ")" and opened["("]:
            weigh(opened["("].pop(), STEP)
        elif said == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / STEP)
        else:
            parts.append([said, 1.0])
    for sign, factor in (("(", STEP), ("[", 1 / STEP)):
        for first in opened[sign]:
            weigh(first, factor)
    joined: list[tuple[str, float]] = []
    for said, weight in parts:
        same = joined and joined[-1][1] == weight
        joined[-1:] = [(joined[-1][0] + said, weight)] if same else [*joined[-1:], (said, weight)]
    return joined or [("", 1.0)]


def in_turns(text: str) -> list[str]:
    """Text -> the texts that alternate, each of which holds one choice of every [a|b]; the text itself where there is none.

    Raises:
        Refusal: more than MOST texts would alternate.
    """
    alternatives = _alternatives(text)
    if alternatives is None:
        return [text]
    before, choices, after = alternatives
    several = [in_turns(f"{before}{choice}{after}") for choice in choices]
    count = math.lcm(len(choices), *map(len, several))
    if count > MOST:
        raise Refusal(f"prompt={text!r}: {count} captions would take turns; at most {MOST}.")
    return [several[i % len(choices)][i % len(several[i % len(choices)])] for i in range(count)]


def taking_turns(guidance: Guidance) -> Guidance:
    """-> the same guidance, in which captions with `turns` alternate, one a step: a step begins at the first call at a lower
    time.
    """

    def guide(model: Conditioned, ask: Batch) -> Denoise:
        lengths = {len(c.turns) for value in ask.values() if isinstance(value, list) for c in value if isinstance(c, Weighted)}
        if not (count := math.lcm(*(n for n in lengths if n)) if lengths - {0} else 0):
            return guidance(model, ask)
        several = [guidance(model, _turn(ask, i)) for i in range(count)]
        step, lowest = -1, math.inf

        def denoise(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
            nonlocal step, lowest
            if (time := float(t.max())) < lowest:
                step, lowest = step + 1, time
            return several[step % count](x_t, t, *to)

        return denoise

    return guide


def _turn(ask: Mapping[str, Any], i: int) -> dict[str, Any]:
    def chosen(caption: Any) -> Any:
        return caption.turns[i % len(caption.turns)] if isinstance(caption, Weighted) and caption.turns else caption

    return {name: list(map(chosen, value)) if isinstance(value, list) else value for name, value in ask.items()}


def _alternatives(text: str) -> tuple[str, list[str], str] | None:
    """-> the text before the first bracket with a |, its choices, and the text behind it; None where there is no such bracket."""
    opened: list[tuple[int, list[int]]] = []
    for sign in re.finditer(r"\\.|[\[\]|]", text):
        if sign[0] == "[":
            opened.append((sign.start(), []))
        elif sign[0] == "|" and opened:
            opened[-1][1].append(sign.start())
        elif sign[0] == "]" and opened:
            start, bars = opened.pop()
            if bars:
                ends = [start, *bars, sign.start()]
                choices = [text[a + 1 : b] for a, b in pairwise(ends)]
                return text[:start], choices, text[sign.end() :]
    return None


def _plain(parts: list[tuple[str, float]]) -> Weighted:
    caption = Weighted("".join(said for said, _ in parts))
    caption.parts = tuple(parts)
    return caption


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise Refusal(f"prompt={text!r}: {word} is no weight; wanted a number, such as (word:1.2).") from error
