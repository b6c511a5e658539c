"""Captions whose embeddings lie in the shards: a text tower that training never runs, and that is read only for a prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.embedder import Condition, complete
from ldm.errors import NotFound, Refusal
from ldm.files.folder import load_tensors, save_tensors
from ldm.types import Batch, Cond, Draw, Embedder, Widths

PARTS = ("tokens", "mask", "vector")  # of a Cond; in the shards `text.<part>.npy`, in a batch `caption_<part>`
NULL = "null.safetensors"


class Embedded(str):
    """A caption that brings along what its text tower says: tokens (L, D), mask (L) and vector (E), where there are such."""

    said: dict[str, Tensor]


class CachedText(Condition):
    """Stands in for the text condition that the shards' embeddings were made with (`embed`, `save_null`).

    Args:
        load: makes the text itself, the first time that a caption comes without its embedding: a prompt.
        path: the folder with null.safetensors, what that text says of a dropped caption.
        key: the field of the captions.
        rate: the share of samples for which the caption is dropped in training, in [0, 1].
        stands_for: the name of that text among the conditions; the same captions are dropped as there.

    Raises:
        NotFound: there is no null.
    """

    def __init__(
        self, load: Callable[[], Embedder], path: str, key: str = "caption", rate: float = 0.1, stands_for: str = "text"
    ) -> None:
        super().__init__()
        if not (Path(path) / NULL).is_file():
            raise NotFound(
                f"There is no {NULL} in {path} (condition.cached_text.path=FOLDER); it comes with shards of embeddings. "
                "condition=[text] reads captions themselves."
            )
        self.load, self.key, self.rate, self.stands_for = load, key, rate, stands_for
        self.kept: list[Embedder] = []  # in a list, so that it is no part of this module
        null = load_tensors(Path(path) / NULL)
        self.parts = [part for part in PARTS if part in null]
        for part in self.parts:
            self.register_buffer(part, null[part], persistent=False)
        self.widths = Widths(tokens=self.tokens.shape[2], vector=self.vector.shape[1] if "vector" in null else 0)

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool -> tokens: (B, L, D), mask: (B, L) or None, vector: (B, E) or None."""
        if not all(isinstance(caption, Embedded) for caption in value):
            return self._text()(value, drop)
        slots = {}
        for part in self.parts:
            null = getattr(self, part)
            said = torch.stack([caption.said[part] for caption in value]).to(null)
            slots[part] = torch.where(drop.to(null.device, non_blocking=True).reshape(-1, *(1,) * (said.ndim - 1)), null, said)
        return Cond(**slots)

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """The captions with their embeddings, where the batch has these.

        Raises:
            Refusal: a batch of training has none, or of another width.
        """
        missing = [part for part in self.parts if f"{self.key}_{part}" not in batch]
        if missing and draw is None:
            return {}
        if missing:
            wanted = ", ".join(f"{self.key}_{part}: text.{part}.npy" for part in self.parts)
            raise Refusal(
                f"cached_text reads embeddings, data.fields={{{wanted}}}, and there is only {sorted(batch)}; condition=[text] "
                "reads captions themselves."
            )
        said = {part: self._filled(part, batch[f"{self.key}_{part}"]) for part in self.parts}
        if shapes := [p for p in self.parts if said[p].shape[1:] != getattr(self, p).shape[1:]]:
            there, here = (tuple(x.shape[1:]) for x in (said[shapes[0]], getattr(self, shapes[0])))
            raise Refusal(
                f"The shards' {shapes[0]} are of shape {there}, the null's of {here}: they are of another text tower "
                "(condition.cached_text.path)."
            )
        captions = [Embedded(caption) for caption in batch.get(self.key, [""] * len(said["tokens"]))]
        for i, caption in enumerate(captions):
            caption.said = {part: value[i] for part, value in said.items()}
        return {self.key: captions}

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts; warns of what the tower's context is too short for."""
        return self._text().read(field, values, size)

    def original(self) -> Embedder:
        """The text itself, compared with what the shards came with; it is not kept."""
        text = complete(self.load()).eval().requires_grad_(False)
        self.compare(text)
        return text

    def compare(self, text: Embedder) -> None:
        """Compares a text with what the shards came with.

        Raises:
            Refusal: it says something else of a dropped caption.
        """
        parts = _parts(text, [""], drop=True)
        if list(parts) != self.parts or not all(_alike(parts[part], getattr(self, part)) for part in parts):
            raise Refusal(
                "condition.cached_text.load makes another text than the shards' embeddings were made with: what it says of a "
                "dropped caption is not their null. Give it the model, layers, padding and so on that made them."
            )

    def _filled(self, part: str, said: Tensor) -> Tensor:
        """said: (B, L', ...), of which only the spoken tokens were kept -> (B, L, ...), as many as the text says."""
        length = getattr(self, part).shape[1]
        if "mask" not in self.parts or part == "vector" or said.shape[1] >= length:
            return said
        return torch.cat((said, said.new_zeros(len(said), length - said.shape[1], *said.shape[2:])), dim=1)

    def _text(self) -> Embedder:
        """The text itself, checked, on this module's device."""
        if not self.kept:
            text = complete(self.load()).eval().requires_grad_(False).to(self.tokens.device)
            self.compare(text)
            self.kept.append(text)
        return self.kept[0].to(self.tokens.device)


def embed(text: Embedder, captions: Sequence[str]) -> dict[str, Tensor]:
    """B captions -> what shards keep of each: text.tokens.npy (B, L, D), text.mask.npy (B, L), text.vector.npy (B, E)."""
    return {f"text.{part}.npy": value for part, value in _parts(text, captions, drop=False).items()}


def spoken_only(text: Embedder, captions: Sequence[str]) -> list[dict[str, Tensor]]:
    """B captions -> what shards keep of each, its tokens up to the last that is spoken: of a masked text as many as it has."""
    said = embed(text, captions)
    if (mask := said.get("text.mask.npy")) is None:
        return [{member: x[i] for member, x in said.items()} for i in range(len(captions))]
    ends = [int(row.nonzero().max()) + 1 if row.any() else 1 for row in mask]
    long = ("text.tokens.npy", "text.mask.npy")
    return [{member: x[i, :end] if member in long else x[i] for member, x in said.items()} for i, end in enumerate(ends)]


def save_null(text: Embedder, folder: Path) -> None:
    """Writes FOLDER/null.safetensors, what `text` says of a dropped caption."""
    save_tensors(_parts(text, [""], drop=True), folder / NULL)


@torch.no_grad()
def _parts(text: Embedder, captions: Sequence[str], drop: bool) -> dict[str, Tensor]:
    cond = text(captions, torch.full((len(captions),), drop))
    return {part: getattr(cond, part).cpu() for part in PARTS if getattr(cond, part) is not None}


def _alike(a: Tensor, b: Tensor) -> bool:
    """To float16's rounding."""
    return a.shape == b.shape and torch.allclose(a.float(), b.cpu().float(), atol=1e-2, rtol=1e-2)
