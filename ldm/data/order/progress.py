"""How far a training has come with its samples."""

from typing import Any


class Progress:
    """Where training stands: `first`, the step of the order at which this run begins, and what the trainer's steps mean in it.

    begun: whether this is known, from a checkpoint or since training began. resumed: a checkpoint was read, and no batch since.
    """

    def __init__(self, batch: int) -> None:
        self.batch, self.first = batch, 0
        self.ahead = 0  # steps of the order beyond the trainer's, after an epoch was begun anew
        self.resumed = self.begun = False

    def begin(self, first: int, step: int) -> None:
        """Goes on with the samples of the order's step `first` at the trainer's `step`."""
        self.first, self.ahead, self.resumed, self.begun = first, first - step, True, True

    def at(self, step: int) -> int:
        """-> the samples that training has taken once the trainer is at `step`."""
        return (step + self.ahead) * self.batch

    def unsaid(self, trainer: Any) -> bool:
        """Whether training goes on from a checkpoint that says nothing of this kind of data."""
        return trainer is not None and trainer.global_step > 0 and not self.begun
