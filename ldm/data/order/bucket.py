"""Aspect-ratio buckets: the sizes that pictures are brought to, and which picture goes where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.order.order import Steps
from ldm.data.shard.index import Index
from ldm.data.shard.selection import Selection
from ldm.errors import Refusal

Size = tuple[int, int]  # height, width in pixels

# SDXL's sizes up to the square (https://arxiv.org/abs/2307.01952, appendix I); the others are these turned.
SDXL_TALL = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024,),
}


def sizes_of(buckets: str | Sequence[Size] | Mapping[str, Any] | None, size: int) -> list[Size]:
    """What `data.buckets` means, as heights and widths.

    null: the square of `size`;  sdxl: SDXL's list;  {step: 64, ratio: 2}: generated about the area size^2, sides multiples of
    step, the longer at most `ratio` times the shorter;  or a list of [height, width].

    Raises:
        Refusal: none of these.
    """
    if buckets is None:
        return [(size, size)]
    if buckets == "sdxl":
        tall = [(h, w) for w, heights in SDXL_TALL.items() for h in heights]
        return sorted({*tall, *((w, h) for h, w in tall)})
    if isinstance(buckets, Mapping) and set(buckets) <= {"step", "ratio"}:
        return generate(size, int(buckets.get("step", 64)), float(buckets.get("ratio", 2.0)))
    if isinstance(buckets, list | tuple) and buckets and all(len(pair) == 2 for pair in buckets):
        return sorted({(int(h), int(w)) for h, w in buckets})
    raise Refusal(
        f"data.buckets={buckets!r}; wanted `sdxl`, {{step: 64, ratio: 2}}, a list of [height, width], or null for squares."
    )


def generate(size: int, step: int, ratio: float) -> list[Size]:
    """Sides in multiples of `step`, as large as the area size^2 allows, the longer at most `ratio` times the shorter."""
    sizes = set()
    for short in range(step, size + 1, step):
        long = int(size * size / short) // step * step
        if short <= long <= ratio * short:
            sizes |= {(short, long), (long, short)}
    if not sizes:
        raise Refusal(f"data.buckets: no sides in multiples of step={step} fit size={size} and ratio={ratio}.")
    return sorted(sizes)


def assign(index: Index, selected: Selection, sizes: Sequence[Size], least: int = 1) -> list[Selection]:
    """Each sample to the size of the nearest aspect ratio, by its logarithm; -> the samples of each size.

    A size with fewer than `least` samples, a batch, gives them to the nearest size that has more.

    Raises:
        Refusal: samples whose width and height are not known.
    """
    rows = [selected.rows_of(s) for s in range(len(index.shards))]
    ratios = []
    for s, chosen in enumerate(rows):
        table = index.table(s)
        ratios.append(np.log(table.column("width")[chosen] / table.column("height")[chosen]))
        if np.isnan(ratios[-1]).any():
            key = table.key(int(chosen[np.isnan(ratios[-1]).argmax()]))
            raise Refusal(
                f"data.buckets needs the width and height of every picture; sample {key!r} in {index.shards[s]} does not say "
                "them, in its record or its header. Leave such samples out: +data.filters.width=[1,null] "
                "+data.filters.missing=drop."
            )
    wanted = np.log([width / height for height, width in sizes])
    open_sizes = np.ones(len(sizes), dtype=bool)
    while True:
        nearest = [np.where(open_sizes, abs(r[:, None] - wanted), math.inf).argmin(1) for r in ratios]
        counts = np.bincount(np.concatenate(nearest), minlength=len(sizes))
        few = open_sizes & (counts > 0) & (counts < least)
        if not few.any() or open_sizes.sum() == 1:
            return [Selection.of([r[n == b] for r, n in zip(rows, nearest)]) for b in range(len(sizes))]
        open_sizes[np.where(few, counts, len(selected) + 1).argmin()] = False


class Report:
    """Says, and logs, as an epoch begins, how many batches it has of each size, and how many pictures there are for them."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes, self.epoch = sizes, -1

    def __call__(self, steps: Steps, step: int, trainer: Any) -> None:
        """step: the one that is about to be taken."""
        epoch = steps.epoch_of(step)
        if epoch == self.epoch:
            return
        self.epoch = epoch
        use = {f"{h}x{w}": (n, count) for (h, w), n, count in zip(self.sizes, steps.use(epoch), steps.counts) if count}
        if trainer.is_global_zero:
            batches = ", ".join(f"{size} {n:,} ({count:,} pictures)" for size, (n, count) in use.items())
            print(f"Epoch {epoch} of data.buckets, batches of each height x width: {batches}", flush=True)
        for logger in trainer.loggers:
            logger.log_metrics({f"data/bucket/{size}": n for size, (n, _) in use.items()}, step=trainer.global_step)
