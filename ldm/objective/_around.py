"""What an objective around another one, `of`, hands on of it: its frozen modules, its critic, and that it meets the model."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from ldm.types import Freezes, Objective


@runtime_checkable
class Critical(Protocol):
    """An objective with modules that learn from the loss `critic`."""

    critic: tuple[str, ...]  # their names


@runtime_checkable
class Meets(Protocol):
    """An objective that meets the model before training."""

    def meet(self, model: Any) -> bool:
        """-> whether it asks for conditions itself, and need be given none."""


@runtime_checkable
class Around(Protocol):
    """An objective around another one."""

    of: Objective


def within(objective: Objective) -> Iterator[Objective]:
    """An objective, the one that it is around, and so on."""
    yield objective
    while isinstance(objective, Around):
        objective = objective.of
        yield objective


def frozen_in(of: Objective) -> tuple[str, ...]:
    """The names of the other's frozen modules."""
    return tuple(f"of.{part}" for part in of.frozen) if isinstance(of, Freezes) else ()


def critic_in(of: Objective) -> tuple[str, ...]:
    """The names of the other's critic."""
    return tuple(f"of.{part}" for part in of.critic) if isinstance(of, Critical) else ()


def meets(of: Objective, model: Any) -> bool:
    """Lets the other meet the model -> whether it asks for conditions itself."""
    return isinstance(of, Meets) and of.meet(model)
