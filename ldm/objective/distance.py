"""How far an answer is from its target: the loss of an error, number by number."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Square:
    """error^2."""

    def __call__(self, error: Tensor) -> Tensor:
        """(*) -> (*)."""
        return error.square()


@dataclass(frozen=True)
class Huber:
    """2 delta (sqrt(error^2 + delta^2) - delta): error^2 where it is small, 2 delta |error| where it is large.

    The pseudo-Huber loss (Charbonnier et al. 1997) at twice delta times its usual scale.
    """

    delta: float = 0.1

    def __call__(self, error: Tensor) -> Tensor:
        """(*) -> (*)."""
        return 2 * self.delta * ((error.square() + self.delta**2).sqrt() - self.delta)
