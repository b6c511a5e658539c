"""How many captions are longer than what a text tower reads."""

from collections.abc import Callable, Sequence


class Cut:
    """Counts the captions of training, and those that are longer than a tower's context, of which the rest is not read.

    `most` is how many tokens it reads, and `lengths` tells how many captions have. `always` counts where nothing is trained too,
    as precompute.py does.
    """

    def __init__(self, most: int, lengths: Callable[[Sequence[str]], list[int]]) -> None:
        self.most, self.lengths, self.always = most, lengths, False
        self.seen = self.cut = self.longest = 0

    def count(self, captions: Sequence[str], full: Sequence[bool]) -> None:
        """B captions, and which of them fill the context: those are looked at."""
        lengths = [n for n in self.lengths([c for c, f in zip(captions, full) if f]) if n > self.most]
        self.seen, self.cut = self.seen + sum(caption != "" for caption in captions), self.cut + len(lengths)
        self.longest = max([self.longest, *lengths])

    def __str__(self) -> str:
        return (
            f"{self.cut:,} of the first {self.seen:,} captions are longer than the {self.most} tokens that the text tower "
            f"reads, the longest {self.longest:,}: what lies behind is cut off."
        )
