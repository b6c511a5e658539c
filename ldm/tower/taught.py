"""Textual inversion (https://arxiv.org/abs/2208.01618): learnt words of a frozen text tower, rows behind its embedding table."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Rows(nn.Module):
    """A tower's embedding table, which stays as it is, with trainable rows behind it.

    `table` is the tower's embedding, or another `Rows`; `rows`, (n, D), are the embeddings of the ids from `first` on.
    """

    def __init__(self, table: nn.Module, rows: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.rows, self.first = table, nn.Parameter(rows), first

    @property
    def weight(self) -> Tensor:
        """-> the table's weight."""
        return self.table.weight

    @property
    def embedding_dim(self) -> int:
        """-> D."""
        return self.rows.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, L) -> (B, L, D). The rows are part of the graph whether a caption uses them or not."""
        mine = ids >= self.first
        known = self.table(ids.masked_fill(mine, 0))
        return torch.where(mine[..., None], self.rows[(ids - self.first).clamp(min=0)].to(known), known)


class Taught:
    """open_clip's tokenizer of CLIP's vocabulary, with the ids of learnt words wherever a caption spells them, in any case.

    `words` maps each word to its ids. Of several words that match, the longest counts, and blanks around it are dropped, as in
    transformers' CLIPTokenizer.add_tokens.
    """

    def __init__(self, tokenizer: Any, words: Mapping[str, Sequence[int]]) -> None:
        self.tokenizer, self.words = tokenizer, {word.lower(): list(ids) for word, ids in words.items()}
        self.end = tokenizer.eot_token_id
        longest = sorted(self.words, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest))})", re.IGNORECASE)

    def encode(self, caption: str) -> list[int]:
        """-> the ids of a caption, without begin and end, not truncated."""
        pieces = [piece for piece in self.pattern.split(caption) if piece]
        return [i for piece in pieces for i in self.words.get(piece.lower()) or self.tokenizer.encode(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """-> the text of some ids; a learnt word stands at the first of its ids."""
        named = {row: word if i == 0 else "" for word, rows in self.words.items() for i, row in enumerate(rows)}
        return "".join(f"{named[i]} " if named.get(i) else "" if i in named else self.tokenizer.decode([i]) for i in ids).strip()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, L) ids: begin, caption (truncated to L - 2), end, zeros."""
        length = self.tokenizer.context_length
        rows = [[self.tokenizer.sot_token_id, *self.encode(caption)[: length - 2], self.end] for caption in captions]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])
