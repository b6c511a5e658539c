"""Captions read by a transformer that is trained with the backbone: the paper's own text model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.embedder import Condition
from ldm.tower.clip import text_mask, warn_of_cut
from ldm.tower.cut import Cut
from ldm.types import Cond, Widths


class Transcript(Condition):
    """A caption -> tokens of a bidirectional transformer over CLIP's byte-pair ids (LDM, 2112.10752, appendix E.2.1, "BERT").

    The paper's is over BERT's words (bert.py). Padding is masked; a dropped caption is the empty one.

    Args:
        width, depth, heads: features of a token, blocks, and heads of attention; 1280 and 32 are the paper's.
        length: tokens of a caption, at most, its two ends among them; what lies behind is cut off.
        key: the field of the captions.
        rate: the share of samples for which the caption is dropped in training, in [0, 1].
    """

    def __init__(
        self, width: int = 1280, depth: int = 32, heads: int = 8, length: int = 77, key: str = "caption", rate: float = 0.1
    ) -> None:
        import open_clip

        super().__init__()
        self.key, self.rate, self.widths = key, rate, Widths(tokens=width)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=length)
        self.cut = Cut(length - 2, lambda captions: [len(self.tokenizer.encode(caption)) for caption in captions])
        self.words, self.places = nn.Embedding(self.tokenizer.vocab_size, width), nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.words.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool, True where the caption is withheld -> tokens: (B, L, D), mask: (B, L)."""
        captions = ["" if d else v for v, d in zip(value, drop.tolist())]
        ids = self.tokenizer(captions)
        if self.training:
            self.cut.count(captions, (ids[:, -1] != 0).tolist())
        ids = ids.to(self.places.device, non_blocking=True)
        mask = text_mask(ids)
        return Cond(tokens=self.transformer(self.words(ids) + self.places, src_key_padding_mask=~mask), mask=mask)

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts; warns of what the context is too short for."""
        return [warn_of_cut(str(a), self.tokenizer, len(self.places)) for a in values]
