"""Which of several processes this is, however they were started: by torchrun, by srun, or by Lightning; and how they meet."""

import datetime
import os
import re
import sys
import warnings
from typing import Any, NamedTuple

# Each launcher's words for a process's number, how many there are, and its number on this machine. A SLURM batch script, which
# is one process, knows SLURM_PROCID and SLURM_NTASKS; only srun says how many tasks its step has.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # 0 on the first process, where they are said


class Process(NamedTuple):
    """One of `world` processes: its number, and its number among those on its machine."""

    rank: int
    world: int
    local: int


def process() -> Process:
    """This process: as they have met (torch.distributed), or else as torchrun or srun say. Those that Lightning starts are
    numbered once they have met; until then they only know which is the `first`.
    """
    names = _launcher()
    said = Process(*(int(os.environ.get(name, 0)) for name in names)) if names else Process(0, 1, 0)
    if not met():
        return said
    dist = sys.modules["torch.distributed"]
    return Process(dist.get_rank(), dist.get_world_size(), said.local or int(os.environ.get("LOCAL_RANK", 0)))


def rank() -> int:
    """This process's number."""
    return process().rank


def world() -> int:
    """How many processes there are."""
    return process().world


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first() -> bool:
    """Whether this is the process that speaks for all; known from the beginning, under Lightning too."""
    return rank() == 0 if met() or _launcher() else all(int(os.environ.get(name, 0)) == 0 for name in NUMBERS)


def say(line: str) -> None:
    """Prints a line, on the process that speaks for all."""
    if first():
        print(line, flush=True)


def warn(line: str) -> None:
    """Warns, on the process that speaks for all."""
    if first():
        warnings.warn(line, stacklevel=3)


def meet() -> None:
    """Joins the processes that torchrun or srun started, if one did. They meet over gloo, also on GPUs: only words are exchanged.

    Under srun at MASTER_ADDR and MASTER_PORT where these are set, or else where Lightning's processes would: on the first
    machine of the step, at a port that follows from the job's number.
    """
    here = process()
    if here.world == 1 or met():
        return
    import torch.distributed as dist

    where = "env://" if _launcher() == TORCHRUN else "tcp://{}:{}".format(*_meeting_place())
    dist.init_process_group("gloo", where, datetime.timedelta(days=2), here.world, here.rank)


def met() -> bool:
    """Whether the processes have met; without torch, which is slow to import, they have not."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def wait() -> None:
    """Until all processes are here."""
    if met():
        sys.modules["torch.distributed"].barrier()


def from_first(value: Any) -> Any:
    """What process 0 has, on every process."""
    if not met():
        return value
    words = [value]
    sys.modules["torch.distributed"].broadcast_object_list(words, src=0)
    return words[0]


def from_all(value: Any) -> list[Any]:
    """What each process has, in order of their numbers, on every process."""
    if not met():
        return [value]
    words = [None] * world()
    sys.modules["torch.distributed"].all_gather_object(words, value)
    return words


def _launcher() -> tuple[str, ...]:
    """The words of who started several processes; of one that started a single process, nothing need be known."""
    return next((names for names in (TORCHRUN, SRUN) if names[0] in os.environ and int(os.environ.get(names[1], 1)) > 1), ())


def _meeting_place() -> tuple[str, int]:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"  # such as a[3-5,8],b1
    first_node = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).replace(" ", ",").split(",")[0]
    port = 15000 + int(os.environ["SLURM_JOB_ID"][-4:]) if "SLURM_JOB_ID" in os.environ else 12910
    return os.environ.get("MASTER_ADDR", first_node), int(os.environ.get("MASTER_PORT", port))
