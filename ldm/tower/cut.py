"""Captions as text towers take them: texts, and a count of those that are longer than a tower's context."""

from collections.abc import Callable, Sequence
from typing import Any

from ldm.errors import Refusal


def texts(values: Sequence[Any]) -> list[str]:
    """B captions, as a batch has them -> the same.

    Raises:
        Refusal: one is no text, such as a whole record.
    """
    if strange := [value for value in values if not isinstance(value, str)]:
        raise Refusal(
            f"captions are texts, found a {type(strange[0]).__name__}: {strange[0]!r:.60}. Name the member of the samples that "
            "holds them: data.fields.caption=txt."
        )
    return list(values)


class Cut:
    """Counts the captions that a text tower reads, and those that are truncated; `str` of it is a sentence about them.

    `most` is the tower's context in tokens, `lengths` maps B captions to their numbers of tokens. `seen` and `cut` are the
    counts, `longest` is the most tokens of a truncated caption. Conditions count in training; with `always`, which precompute.py
    sets, outside of it too.
    """

    def __init__(self, most: int, lengths: Callable[[Sequence[str]], list[int]]) -> None:
        self.most, self.lengths, self.always = most, lengths, False
        self.seen = self.cut = self.longest = 0

    def count(self, captions: Sequence[str], full: Sequence[bool]) -> None:
        """Counts B captions; `full` says which of them fill the context, since only those can be longer."""
        lengths = [n for n in self.lengths([c for c, f in zip(captions, full) if f]) if n > self.most]
        self.seen, self.cut = self.seen + sum(caption != "" for caption in captions), self.cut + len(lengths)
        self.longest = max([self.longest, *lengths])

    def __str__(self) -> str:
        return (
            f"{self.cut:,} of the first {self.seen:,} captions are longer than the {self.most} tokens that the text tower "
            f"reads, the longest {self.longest:,}: what lies behind is cut off."
        )
