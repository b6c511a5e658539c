"""Several texts of one caption as one: what precompute.py keeps of a CLIP and a T5 beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ldm.embedder import Condition, complete
from ldm.errors import Refusal
from ldm.types import Cond, Embedder, Widths


class Together(Condition):
    """A caption -> the tokens of its `members` by length and their vectors by width, as of conditions beside each other.

    It is dropped as a whole: then each of them says what it says of a dropped caption. `key` and `rate` here are for all of them.

    Raises:
        Refusal: the members' tokens are of different widths, or one of them reads another field.
    """

    def __init__(self, members: Mapping[str, Embedder], key: str = "caption", rate: float = 0.1) -> None:
        super().__init__()
        members = {name: complete(member) for name, member in members.items()}
        self.key, self.rate, self.members, self.widths = key, rate, nn.ModuleDict(members), Widths()
        for name, member in members.items():
            if member.key != key:
                raise Refusal(f"condition.{name}.key={member.key}: texts that are kept together read one field, here {key}.")
            self.widths += member.widths
        self.frozen = tuple(f"members.{name}.{part}" for name, member in members.items() for part in member.frozen)
        self.cut = next((member.cut for member in members.values() if member.cut is not None), None)

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool -> tokens: (B, sum of L, D), their mask or None, vector: (B, sum of E) or None."""
        cond = Cond()
        for member in self.members.values():
            cond = cond + member(value, drop)
        return cond

    @property
    def unreached(self) -> tuple[str, ...]:
        """Those of the members."""
        return tuple(f"members.{name}.{part}" for name, member in self.members.items() for part in member.unreached)

    @property
    def taught(self) -> tuple[str, ...]:
        """What each of its members was taught."""
        return tuple(dict.fromkeys(word for member in self.members.values() for word in member.taught))

    def settings(self) -> dict[str, Any] | None:
        """What, besides their weights, decides what they say; None where one does not tell."""
        each = {name: member.settings() for name, member in self.members.items()}
        return None if None in each.values() else each

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts; each member warns of what it cuts off."""
        for member in self.members.values():
            prompts = member.read(field, values, size)
        return prompts
