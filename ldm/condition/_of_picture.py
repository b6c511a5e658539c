"""The base of conditions that read one field, a picture."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ldm.condition._files import read_pictures
from ldm.embedder import Condition, Input


class OfPicture(Condition):
    """How a person names the picture, and what is shown of it."""

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Tensor:
        """Files of pictures, or folders of them -> (N, 3, height, width) in [-1, 1]."""
        return read_pictures(field, values, size)

    def input(self, field: str) -> Input:
        """A picture."""
        return Input("picture")

    def show(self, value: Tensor) -> Tensor:
        """value: as in `forward` -> the same."""
        return value
