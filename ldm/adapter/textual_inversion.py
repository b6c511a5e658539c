"""Textual inversion: a new word of a text tower, rows of its own beside the frozen table (https://arxiv.org/abs/2208.01618).

A run's tensors are `conditioner.embedders.<name>.tower.token_embedding.rows` (n, D), one of each tower, trained together.
"""

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.files.process import first

NAME = re.compile(r"(conditioner\.embedders\..+)\.tower\.token_embedding\.rows")


@runtime_checkable
class Learner(Protocol):
    """A text that can be taught words."""

    def begin(self, words: str, count: int) -> Tensor:
        """(count, D), the rows of plain words' tokens, in turn."""

    def learn(self, word: str, rows: Tensor) -> None:
        """Reads these rows, (n, D), where a caption spells the word."""


class TextualInversion:
    """A word that stands for what a few pictures show.

    Args:
        word: as captions and prompts spell it, such as <fox>: none that the text tower knows.
        begin: plain words whose rows the word begins with, such as animal; for training alone.
        vectors: rows of the word, in each tower; of fewer tokens of `begin` each stands for several.

    Raises:
        Refusal: no vectors.
    """

    scales = False

    def __init__(self, word: str, begin: str | None = None, vectors: int = 1) -> None:
        if vectors < 1:
            raise Refusal(f"adapter.textual_inversion.vectors={vectors} would make it nothing.")
        self.word, self.begin, self.vectors = str(word), begin, vectors

    def owns(self, name: str) -> bool:
        """By the end of its name."""
        return NAME.fullmatch(name) is not None

    def attach(self, model: nn.Module) -> list[str]:
        """Gives each text tower the word, which reads as `begin` at first -> the names of its rows.

        Raises:
            Refusal: the word is one already, no text tower is run, or `begin` does not fit.
        """
        if self.begin is None:
            raise Refusal(
                f"adapter.textual_inversion.begin: a plain word that {self.word} begins as, such as animal, must be said."
            )
        towers = self._towers(model)
        for text in towers.values():
            text.learn(self.word, text.begin(self.begin, self.vectors))
        names = [f"{name}.tower.token_embedding.rows" for name in towers]
        if first():
            widths = " and ".join(str(model.get_parameter(name).shape[1]) for name in names)
            print(f"adapter.textual_inversion: {self.word} is {self.vectors} rows of {widths}, {self.begin} at first", flush=True)
        return names

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor], strength: float, base: Mapping[str, Tensor]) -> None:
        """Teaches the model's text towers the word.

        Raises:
            Refusal: it is a word already, or of another model.
        """
        if not strength or not tensors:
            return
        towers, rows = self._towers(model), {NAME.fullmatch(name)[1]: x for name, x in tensors.items()}
        if towers.keys() != rows.keys():
            raise Refusal(f"{self.word} has rows of {', '.join(rows)}; this model's text towers are of {', '.join(towers)}.")
        for name, text in towers.items():
            text.learn(self.word, rows[name])

    def _towers(self, model: Any) -> dict[str, Learner]:
        towers = {name: part for name, part in model.named_modules() if isinstance(part, Learner)}
        if not towers:
            kinds = ", ".join(type(e).__name__ for e in model.conditioner.embedders.values()) or "nothing"
            raise Refusal(
                f"{self.word}: no text tower is run here that could be taught a word (the model is told by {kinds}): "
                "condition=[text], not cached_text."
            )
        return towers
