"""As many CPU threads as make steps quickest, found on the steps themselves."""

import os
import time
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.files.process import cores

TRIES = 4  # steps with each number of threads; the first, in which libraries lay out anew what they keep, does not count
FAR = 2.0  # times as long as with the number so far, after which a number is tried no more


class Threads(pl.Callback):
    """On a CPU, times real steps with half as many threads, with as many and with twice as many, and goes on with the quickest.

    It begins with one, tries again after a change, and every `every` steps, since other jobs come and go: two threads on two
    cores may take many times as long as one where another job has one of them, and one such step ends the try. `most` is null for
    all cores that this process may use. The numbers of a run differ by rounding only. Training leaves the process with the number
    found last.
    """

    def __init__(self, every: int = 200, most: int | None = None) -> None:
        self.every, self.most = every, most or allowed()
        self.seconds: dict[int, list[float]] = {}
        self.plan: list[int] = []  # numbers of threads, one for each step to come
        self.best, self.rest, self.begin = 1, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begins with one thread, and to try."""
        if module.device.type == "cpu" and self.most > 1:
            self._try()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Sets the number of threads whose turn it is."""
        if self.plan:
            torch.set_num_threads(self.plan[0])
            self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Notes how long a step took that was a try, and chooses after the last."""
        if self.plan:
            count, seconds = self.plan.pop(0), time.perf_counter() - self.begin
            self.seconds.setdefault(count, []).append(seconds)
            if count != self.best and seconds > FAR * median(self.seconds[self.best][1:]):
                del self.seconds[count]
                self.plan = [other for other in self.plan if other != count]
            if not self.plan:
                self._choose()
        elif self.rest:
            self.rest -= 1
            if not self.rest:
                self._try()

    def _try(self) -> None:
        others = {max(self.best // 2, 1), min(2 * self.best, self.most)} - {self.best}
        counts = [self.best, *sorted(others)]
        self.seconds, self.plan = {}, [count for count in counts for _ in range(TRIES)]

    def _choose(self) -> None:
        before = self.best
        self.best = quickest(self.seconds)
        torch.set_num_threads(self.best)
        self.rest = self.every
        if self.best not in (before, 1, self.most):
            self._try()


def quickest(seconds: dict[int, list[float]]) -> int:
    """Seconds of some steps by number of threads -> that number whose median, without the first step, is the least."""
    return min(seconds, key=lambda count: median(seconds[count][1:]))


def allowed() -> int:
    """CPU cores that this process may use, and no more than OMP_NUM_THREADS where it is set."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(said)) if said.isdigit() and int(said) else cores()
