"""Words that a frozen text tower is taught (https://arxiv.org/abs/2208.01618): rows beside its table, and who spells them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Rows(nn.Module):
    """A tower's table, which stays as it is, and behind it rows of a word's own.

    table: its embedding of ids, or again such a one. rows: (n, D), of the ids from `first` on.
    """

    def __init__(self, table: nn.Module, rows: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.rows, self.first = table, nn.Parameter(rows), first

    @property
    def weight(self) -> Tensor:
        """The table's."""
        return self.table.weight

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.rows.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, L) -> (B, L, D). The rows are in every graph, whether a caption spells them or not."""
        mine = ids >= self.first
        known = self.table(ids.masked_fill(mine, 0))
        return torch.where(mine[..., None], self.rows[(ids - self.first).clamp(min=0)].to(known), known)


class Taught:
    """open_clip's tokenizer of CLIP's vocabulary, and the ids of learned words, wherever a caption spells them, in any case.

    Of words that begin alike the longest counts, and blanks around it are none, as in CLIPTokenizer.add_tokens.
    """

    def __init__(self, tokenizer: Any, words: Mapping[str, Sequence[int]]) -> None:
        self.tokenizer, self.words = tokenizer, {word.lower(): list(ids) for word, ids in words.items()}
        self.end = tokenizer.eot_token_id
        longest = sorted(self.words, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest))})", re.IGNORECASE)

    def encode(self, caption: str) -> list[int]:
        """The ids of a caption, without begin and end."""
        pieces = [piece for piece in self.pattern.split(caption) if piece]
        return [i for piece in pieces for i in self.words.get(piece.lower()) or self.tokenizer.encode(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """The words of some ids; of a learned one its own, at the first of its ids."""
        named = {row: word if i == 0 else "" for word, rows in self.words.items() for i, row in enumerate(rows)}
        return "".join(f"{named[i]} " if named.get(i) else "" if i in named else self.tokenizer.decode([i]) for i in ids).strip()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, L) ids: begin, caption, end, zeros."""
        length = self.tokenizer.context_length
        rows = [[self.tokenizer.sot_token_id, *self.encode(caption)[: length - 2], self.end] for caption in captions]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])
