"""Captions read by the LDM paper's own text model, over BERT's words, trained with the backbone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ldm.embedder import Condition, texts
from ldm.errors import NotFound
from ldm.tower.cut import Cut
from ldm.types import Cond, Widths

PADDING = "[PAD]"


class Bert(Condition):
    """A caption -> tokens (B, L, D) of a bidirectional transformer (LDM, 2112.10752, appendix E.2.1 and table 17).

    Captions are padded to `length`; the padding is attended to as well, as published. A dropped caption is the empty one.

    Args:
        vocabulary: a folder with BERT's uncased `vocab.txt`.
        width, depth, heads: features of a token, blocks, and heads of attention.
        head_width: features of a head, whatever `width` is.
        length: words of a caption, at most, its two ends among them; what lies behind is cut off.
        key: the field of the captions.
        rate: the share of samples for which the caption is dropped in training, in [0, 1].

    Raises:
        NotFound: there is no vocabulary.
    """

    def __init__(
        self,
        vocabulary: str,
        width: int = 1280,
        depth: int = 32,
        heads: int = 8,
        head_width: int = 64,
        length: int = 77,
        key: str = "caption",
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        path = Path(vocabulary) / "vocab.txt"
        if not path.is_file():
            raise NotFound(
                f"There are no words in {path}. BERT's vocab.txt comes with google-bert/bert-base-uncased; name its folder by "
                "condition.bert.vocabulary=FOLDER."
            )
        self.key, self.rate, self.widths = key, rate, Widths(tokens=width)
        self.tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
        self.tokenizer.enable_truncation(length)
        self.cut = Cut(length - 2, lambda captions: [_length(row) for row in self.tokenizer.encode_batch(list(captions))])
        self.tokenizer.enable_padding(length=length, pad_id=self.tokenizer.token_to_id(PADDING), pad_token=PADDING)
        self.words, self.places = nn.Embedding(self.tokenizer.get_vocab_size(), width), nn.Embedding(length, width)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, head_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool, True where the caption is withheld -> tokens: (B, L, D)."""
        ids = self.ids(["" if d else v for v, d in zip(value, drop.tolist())]).to(self.places.weight.device, non_blocking=True)
        h = self.words(ids) + self.places.weight
        for block in self.blocks:
            h = block(h)
        return Cond(tokens=self.norm(h))

    def ids(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, L) word ids, cut or padded to the length."""
        rows = self.tokenizer.encode_batch(texts(captions))
        if self.training:
            self.cut.count(captions, [bool(row.overflowing) for row in rows])
        return torch.tensor([row.ids for row in rows])

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts; warns of those that the context is too short for."""
        for prompt, row in zip(values, self.tokenizer.encode_batch([str(a) for a in values])):
            if row.overflowing:
                warn(
                    f"{_length(row)} words do not fit into {self.cut.most}; cut off: the end of {str(prompt)!r}",
                    stacklevel=2,
                )
        return [str(a) for a in values]


def _length(row: Any) -> int:
    """The words of an encoded caption, what was cut off among them, the two at the ends apart."""
    return sum(sum(part.attention_mask) - 2 for part in (row, *row.overflowing))


class Block(nn.Module):
    """Attention of the words to each other, then a feed-forward, each normalised before."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q, k, v = self.qkv(self.norm_in(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.wide(self.norm_out(x))))
