"""Counts samples that could not be read, writes them down, and stops where they are too many."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.files.process import warn
from ldm.types import Batch

FIRST = 1000  # samples before which a fraction says little
SAID = 10  # how many are named in the log; the file has all


class BadSamples:
    """The bad samples that this process was shown.

    Args:
        most: the fraction of all samples beyond which training stops.
    """

    def __init__(self, most: float) -> None:
        self.most, self.seen, self.reasons = most, 0, Counter[str]()

    @property
    def count(self) -> int:
        """How many there were."""
        return self.reasons.total()

    def note(self, batch: Batch, trainer: Any) -> None:
        """Takes what a batch says: each bad sample's member, key, shard and error, and how many samples there were.

        Raises:
            Refusal: there were more than `most` of all.
        """
        bad = batch.get("bad", ())
        self.seen += len(batch["key"]) + len(bad)
        for line in bad:
            self.reasons[reason(line)] += 1
            if self.count <= SAID:
                warn(f"{line}{' (more are only written down)' if self.count == SAID else ''}")
        file = trainer and Path(trainer.default_root_dir) / f"bad-samples-{trainer.global_rank}.txt"
        if bad and trainer is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.write("".join(f"{line}\n" for line in bad))
            for logger in trainer.loggers:
                logger.log_metrics({"data/bad": self.count}, step=trainer.global_step)
        if self.count > self.most * max(self.seen, FIRST):
            raise Refusal(
                f"{self.count} of {self.seen} samples cannot be read, more than data.max_bad_fraction={self.most} of them: "
                f"{'; '.join(f'{n} x {why}' for why, n in self.reasons.most_common(3))}. "
                f"{f'They are named in {file}. ' if file else ''}`python -m ldm doctor SHARDS --repair OUT` leaves them out."
            )


def reason(line: str) -> str:
    """What a line says that others may say too: no key, no shard, no number."""
    return re.sub(r"\d+", "N", line.partition(": ")[2]) or "missing or too large"
