"""Class labels, trained with the backbone."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.embedder import Condition, Input
from ldm.errors import Refusal
from ldm.types import Cond, Widths


class Label(Condition):
    """A class index -> one token (https://arxiv.org/abs/2112.10752, appendix E.2), or a vector (DiT, 2212.09748).

    The table's last row means "no label".

    Args:
        classes: their number, or their names, by which they can then be asked for.
        width: of the token or vector.
        slot: which of the two it is.
        key: the field of the class.
        rate: the share of samples for which it is dropped in training, in [0, 1].
    """

    def __init__(
        self,
        classes: int | Sequence[str],
        width: int,
        slot: Literal["tokens", "vector"] = "tokens",
        key: str = "label",
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.names = [] if isinstance(classes, int) else list(classes)
        self.key, self.rate, self.slot, self.widths = key, rate, slot, Widths(**{slot: width})
        self.table = nn.Embedding((classes if isinstance(classes, int) else len(classes)) + 1, width)

    def forward(self, value: Tensor, drop: Tensor) -> Cond:
        """value: (B) integers in [0, classes), drop: (B) bool -> tokens: (B, 1, D), or vector: (B, D).

        Raises:
            Refusal: a label is out of range.
        """
        nothing = self.table.num_embeddings - 1
        value = torch.as_tensor(value)
        if any(not 0 <= label < nothing for label in value.tolist()):
            raise Refusal(
                f"Labels from {int(value.min())} to {int(value.max())} were found; this model knows 0 to {nothing - 1} "
                "(condition.label.classes=...)."
            )
        rows = self.table(value.masked_fill(drop.to(value.device), nothing).to(self.table.weight.device, non_blocking=True))
        return Cond(vector=rows) if self.slot == "vector" else Cond(tokens=rows[:, None])

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Class numbers, or names or the beginnings of names -> (N) integers.

        Raises:
            Refusal: a word that begins no class' name, or several.
        """
        return torch.tensor([self._number(str(a)) for a in values])

    def input(self, field: str) -> Input:
        """One of the names where they tell the classes apart, else a number."""
        words = {name.lower() for name in self.names}
        if len(words) == len(self.names) > 0 and not any(word.lstrip("-").isdigit() for word in words):
            return Input("choice", tuple(self.names))
        return Input("number", low=0, high=self.table.num_embeddings - 2, whole=True)

    def _number(self, word: str) -> int:
        if word.lstrip("-").isdigit():
            return int(word)
        matches = [i for i, name in enumerate(self.names) if name.lower().startswith(word.lower())]
        exact = [i for i in matches if self.names[i].lower() == word.lower()]
        if len(exact or matches) != 1:
            known = ", ".join(self.names) or f"numbers only, 0 to {self.table.num_embeddings - 2}"
            raise Refusal(f"ask.{self.key}={word} is the beginning of {len(matches)} classes' names; there are: {known}.")
        return (exact or matches)[0]
