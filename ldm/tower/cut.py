"""Counts the captions that are longer than what reads them: what lies behind a reader's context is lost, and is said."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Cut:
    """How many captions were seen, how many of them were cut, and the longest.

    length: tokens that are read, the two at the ends among them. `always` counts where nothing is trained too, as precompute.py
    does.
    """

    def __init__(self, length: int) -> None:
        self.length, self.always = length, False
        self.seen = self.cut = self.longest = 0

    def count(self, captions: Sequence[str], ids: Tensor, tokenizer: Any) -> None:
        """B captions and their ids (B, L), on the processor: those that fill the context are looked at again."""
        full = [caption for caption, last in zip(captions, ids[:, -1].tolist()) if last and hasattr(tokenizer, "encode")]
        self.note(captions, [len(tokenizer.encode(caption)) for caption in full])

    def note(self, captions: Sequence[str], lengths: Sequence[int]) -> None:
        """B captions, and the tokens, apart from the ends, of those that may be too long."""
        cut = [n for n in lengths if n > self.length - 2]
        self.seen, self.cut = self.seen + sum(caption != "" for caption in captions), self.cut + len(cut)
        self.longest = max([self.longest, *cut])

    def __str__(self) -> str:
        return (
            f"{self.cut:,} of the first {self.seen:,} captions are longer than the {self.length - 2} tokens that the text tower "
            f"reads, the longest {self.longest:,}: what lies behind is cut off."
        )
