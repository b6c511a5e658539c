"""Two pieces of work side by side in one process: the same inputs, interleaved, the median of the rounds' ratios."""

import statistics
import time
from dataclasses import dataclass

import torch

ROUND = 5.0  # seconds of a round on a GPU
HEAD = ["of diffusers' time", "range", "rounds", "ours (s)", "diffusers (s)", "largest difference"]


@dataclass(frozen=True)
class Result:
    """Of each round: ours / theirs, and seconds of each; `apart` is the largest difference of what they put out, `memory` the
    most that a run of each had on a GPU, in bytes, both networks with it, and `first` the seconds of each one's first run.
    """

    ratios: list[float]
    ours: list[float]
    theirs: list[float]
    apart: float
    memory: tuple[int, int] = (0, 0)
    first: tuple[float, float] = (0.0, 0.0)

    def cells(self):
        """-> the cells of a table below HEAD."""
        low, high = min(self.ratios), max(self.ratios)
        seconds = [f"{statistics.median(times):.3g}" for times in (self.ours, self.theirs)]
        return [
            f"{statistics.median(self.ratios):.3f}",
            f"{low:.3f} to {high:.3f}",
            str(len(self.ratios)),
            *seconds,
            f"{self.apart:.0e}",
        ]

    def speed(self, batch):
        """-> the cell that says how many pictures ours takes a second."""
        return f"{batch / statistics.median(self.ours):.3g}"


def race(ours, theirs, rounds=12, minutes=5.0, device="cpu", most=1e-4, tell=None):
    """ours, theirs: () -> tensors. Who goes first alternates; the first round warms up, and its outputs must agree.

    On a GPU, which works while the host goes on, two more rounds warm up (a graph is captured in the second), and a round is as
    many runs as take ROUND seconds, waited for once: 12 rounds are two minutes of steady state. `tell`: Result -> None, is told
    after each round.

    Raises:
        ValueError: they differ by more than `most` of the largest output; nothing is timed then.
    """
    start, works = time.monotonic(), (ours, theirs)
    (begun, mine), (other_begun, other) = (clock(work, device) for work in works)
    apart = max(difference(a, b) for a, b in zip(mine, other, strict=True))
    if not apart <= most:
        raise ValueError(f"The outputs differ by {apart:.1e} of the largest; at most {most:.0e} is allowed.")
    del mine, other
    seconds, runs, memory = {work: [] for work in works}, 1, (0, 0)
    if torch.device(device).type != "cpu":
        for work in works:
            clock(work, device)
        warm, memory = zip(*(measured(work, device) for work in works))
        runs = max(1, round(ROUND / max(warm)))
    for i in range(rounds):
        for work in works if i % 2 else works[::-1]:
            seconds[work].append(clock(work, device, runs)[0])
        ratios = [a / b for a, b in zip(*seconds.values())]
        result = Result(ratios, *seconds.values(), apart, memory, (begun, other_begun))
        if tell is not None:
            tell(result)
        if time.monotonic() - start > 60 * minutes and i >= 2:
            break
    return result


def measured(work, device):
    """-> seconds of a run on a GPU, and the most memory that was allocated meanwhile, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = clock(work, device)
    return seconds, torch.cuda.max_memory_allocated()


def clock(work, device="cpu", runs=1):
    """-> seconds of a run, what the last one put out: the process's time on a CPU, elapsed time on a GPU."""
    on_cpu = torch.device(device).type == "cpu"
    now, finish = (time.process_time, lambda: None) if on_cpu else (time.perf_counter, torch.cuda.synchronize)
    finish()
    start = now()
    for _ in range(runs):
        out = work()
    finish()
    return (now() - start) / runs, out


def difference(a, b):
    """The largest difference of two tensors, as a part of the largest number in b."""
    return ((a - b).abs().max() / b.abs().max()).item()
