"""Captions, read by a frozen T5 or by any encoder of transformers."""

from collections.abc import Sequence
from typing import Any, Literal
from warnings import warn

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.embedder import Condition, texts
from ldm.errors import Refusal
from ldm.files.weights import came_from, loaded_from
from ldm.tower.cut import Cut
from ldm.tower.language import load_language, load_words, truncated
from ldm.tower.t5 import T5
from ldm.types import Cond, Widths


class Language(Condition):
    """A caption -> `length` tokens (B, L, D) of a hidden layer of a language model.

    The tower computes in its weights' own precision, whatever training computes in; what it says is float32.

    Args:
        model: a folder with config.json, weights, whole or in pieces, and a tokenizer; or a repository of the Hugging Face hub,
            org/name or org/name/FOLDER. A T5 v1.1 is read here, any other model by transformers.
        layer: of the hidden states, 0 before the first block, k after the k-th, -1 the last, which is normed.
        length: tokens of a caption, at most, its end among them; what lies behind is cut off.
        padding: `masked`, neither the tower nor the backbone reads it (PixArt, PRX), and it is zeros; or `attended`: both do, as
            in Stable Diffusion 3 and Flux.
        dropped: what a withheld caption says: that of the empty one, or zeros.
        tokenizer: where it lies, if not in `model`.
        precision: of the tower's weights.
        pretrained: false leaves its weights random: for what is reckoned, and not run.
        key: the field of the captions.
        rate: the share of samples for which the caption is dropped in training, in [0, 1].

    Raises:
        NotFound, Unreachable: the model is not there. Refusal: it is not read here, or has no such layer.
    """

    frozen = unreached = ("tower",)

    def __init__(
        self,
        model: str,
        layer: int = -1,
        length: int = 256,
        padding: Literal["masked", "attended"] = "masked",
        dropped: Literal["empty_prompt", "zeros"] = "empty_prompt",
        tokenizer: str | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        pretrained: bool | None = True,
        key: str = "caption",
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.key, self.rate, self.layer, self.length, self.padding, self.dropped = key, rate, layer, length, padding, dropped
        self.tower = load_language(model, bool(pretrained), getattr(torch, precision), "condition.language")
        self.words = load_words(tokenizer or model, "condition.language", isinstance(self.tower, T5)) if pretrained else None
        came_from(self, loaded_from(self.tower))
        count = self.tower.depth + 1
        if not -count <= layer < count:
            raise Refusal(f"condition.language.layer={layer}: wanted one of this tower's, 0 to {count - 1} or -1 to -{count}.")
        if length < 1:
            raise Refusal(f"condition.language.length={length}: wanted the most tokens of a caption, 1 or more.")
        self.cut = Cut(length, lambda captions: [len(row) for row in self.words.rows(captions)] if captions else [])
        self.widths = Widths(tokens=self.tower.width)

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool, True where the caption is withheld -> tokens, and their mask where there is one."""
        ids, mask = self.ids(["" if d else v for v, d in zip(value, drop.tolist())])
        longest, place = int(mask.sum(1).max()), next(self.tower.parameters()).device
        if self.padding == "masked":  # nobody reads what lies behind the longest
            ids, read = ids[:, :longest], mask[:, :longest].to(place, non_blocking=True)
        kind = "cpu" if place.type == "meta" else place.type  # which knows no autocast
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            states = self.tower(ids.to(place, non_blocking=True), read if self.padding == "masked" else None)
        tokens = states[self.layer].float()
        if self.dropped == "zeros":
            tokens = tokens * (~drop).to(tokens, non_blocking=True)[:, None, None]
        if self.padding == "attended":
            return Cond(tokens=tokens)
        tokens = tokens.masked_fill(~read[..., None], 0.0)
        return Cond(tokens=pad(tokens, (0, 0, 0, self.length - longest)), mask=mask.to(place, non_blocking=True))

    def ids(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> (B, L) token ids, and which of them are of the caption; on the processor."""
        if self.words is None:  # what is reckoned without weights has no words either: as many as may be
            shape = (len(captions), self.length)
            return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        rows = self.words.rows(texts(captions))
        full = [len(row) > self.length for row in rows]
        if self.training or self.cut.always:
            self.cut.count(captions, full)
        rows = [self.words.cut(caption, self.length) if f else row for caption, row, f in zip(captions, rows, full)]
        ids = torch.full((len(rows), self.length), self.words.padding)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return ids, torch.arange(self.length) < torch.tensor([[max(1, len(row))] for row in rows])

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts; warns of what is cut off."""
        for prompt in map(str, values):
            count, behind = truncated(self.words, prompt, self.length)
            if behind:
                warn(f"{count} tokens do not fit into {self.length}; cut off: {behind!r}", stacklevel=2)
        return [str(a) for a in values]

    def settings(self) -> dict[str, Any]:
        """What, besides its weights, decides what it says."""
        return {name: getattr(self, name) for name in ("layer", "length", "padding", "dropped")}


class Silence(Condition):
    """`length` tokens of zeros, which the backbone attends to: where a Stable Diffusion 3 is asked without its T5."""

    def __init__(self, length: int, width: int, key: str = "caption", rate: float = 0.0) -> None:
        super().__init__()
        self.key, self.rate, self.length, self.widths = key, rate, length, Widths(tokens=width)

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, which are not read -> tokens: (B, L, D), zeros."""
        return Cond(tokens=torch.zeros(len(value), self.length, self.widths.tokens))

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts."""
        return [str(a) for a in values]
