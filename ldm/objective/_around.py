"""The base of objectives around another one, `of`."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ldm.objective.regression import LOGIT_NORMAL, NORMAL, PLAIN, SQUARE
from ldm.types import Critical, Draw, Freezes, Meets, Objective, Schedule


class Around(nn.Module):
    """It hands on what the other one has: its frozen modules, its critic, and that it meets the model.

    Args:
        of: makes the other objective from the four parts.
        time, weight, noise, distance: these parts, as in regression.
    """

    def __init__(
        self,
        of: Callable[..., Objective],
        time: Callable[[Tensor, Schedule], Tensor] = LOGIT_NORMAL,
        weight: Callable[[Tensor, Tensor, Tensor], Tensor] = PLAIN,
        noise: Callable[[Draw, Tensor], Tensor] = NORMAL,
        distance: Callable[[Tensor], Tensor] = SQUARE,
    ) -> None:
        parts = {"time": time, "weight": weight, "noise": noise, "distance": distance}
        super().__init__()
        self.of = of(**parts)
        self.frozen = tuple(f"of.{part}" for part in self.of.frozen) if isinstance(self.of, Freezes) else ()
        self.critic = tuple(f"of.{part}" for part in self.of.critic) if isinstance(self.of, Critical) else ()

    def meet(self, model: Any) -> bool:
        """As the other objective does."""
        return isinstance(self.of, Meets) and self.of.meet(model)


def within(objective: Objective) -> Iterator[Objective]:
    """An objective, the one that it is around, and so on."""
    yield objective
    while isinstance(objective, Around):
        objective = objective.of
        yield objective
