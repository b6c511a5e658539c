"""The rank of this process among several, whether torchrun, srun or Lightning started them, and their communication."""

import atexit
import datetime
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from ldm.errors import Refusal

# Each launcher's words for a process's number, how many there are, and its number on this machine. A SLURM batch script, which
# is one process, knows SLURM_PROCID and SLURM_NTASKS; only srun says how many tasks its step has.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # 0 on the first process, where they are said


class Process(NamedTuple):
    """One of `world` processes: its `rank`, from 0, and its `local` rank, among those on its machine."""

    rank: int
    world: int
    local: int


def end_soon() -> None:
    """Lets this process end without taking its modules apart, which takes a second or two once torch is imported.

    What is garbage then is collected as ever, and all that is to be done at the end is done; modules go with the process.
    """
    atexit.unregister(_freeze)
    atexit.register(_freeze)


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def process() -> Process:
    """-> this process, by torch.distributed where that is initialized, or else by the environment of torchrun or srun.

    Processes that Lightning starts have numbers once torch.distributed is initialized; before, they only know which is `first`.
    """
    names = _launcher()
    launched = Process(*(int(os.environ.get(name, 0)) for name in names)) if names else Process(0, 1, 0)
    if not met():
        return launched
    dist = sys.modules["torch.distributed"]
    return Process(dist.get_rank(), dist.get_world_size(), launched.local or int(os.environ.get("LOCAL_RANK", 0)))


def rank() -> int:
    """-> this process' number, from 0."""
    return process().rank


def world() -> int:
    """-> the number of processes."""
    return process().world


def cores() -> int:
    """-> the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first() -> bool:
    """Whether this is the process that prints and writes for all; it is known before the processes are connected."""
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
    """Initializes torch.distributed if torchrun or srun started several processes: over gloo, since little is exchanged.

    Under srun they connect to MASTER_ADDR and MASTER_PORT where these are set, or else where Lightning's processes would: to the
    first machine of the step, at a port that follows from the job's number.
    """
    here = process()
    if here.world == 1 or met():
        return
    import torch.distributed as dist

    where = "env://" if _launcher() == TORCHRUN else "tcp://{}:{}".format(*_meeting_place())
    dist.init_process_group("gloo", where, datetime.timedelta(days=2), here.world, here.rank)


def met() -> bool:
    """Whether torch.distributed is initialized; torch, which is slow to import, is not imported for it."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def wait() -> None:
    """Waits for all processes (a barrier)."""
    if met():
        sys.modules["torch.distributed"].barrier()


def from_first(value: Any) -> Any:
    """-> process 0's value, on every process (a broadcast)."""
    if not met():
        return value
    values = [value]
    sys.modules["torch.distributed"].broadcast_object_list(values, src=0)
    return values[0]


def by_first(task: Callable[[], Any]) -> Any:
    """-> what a task gives, on every process. It runs on process 0 alone, and what ends it there ends all.

    Raises:
        Refusal: on the other processes, what was raised on process 0, where it is raised as it was.
    """
    if not met():
        return task()
    value, raised = None, None
    try:
        value = task() if rank() == 0 else None
    except Exception as error:  # it is raised below, once the others know
        raised = error
    said = str(raised) if isinstance(raised, Refusal) else f"The first process has stopped: {raised!r}"
    value, failed = from_first((value, None if raised is None else said))
    if raised is not None:
        raise raised
    if failed is not None:
        raise Refusal(failed)
    return value


def from_all(value: Any) -> list[Any]:
    """-> every process' value, by rank, on every process (an all-gather)."""
    if not met():
        return [value]
    values = [None] * world()
    sys.modules["torch.distributed"].all_gather_object(values, value)
    return values


def _launcher() -> tuple[str, ...]:
    """-> the variables of the launcher that started several processes; none where there is one process."""
    return next((names for names in (TORCHRUN, SRUN) if names[0] in os.environ and int(os.environ.get(names[1], 1)) > 1), ())


def _meeting_place() -> tuple[str, int]:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"  # such as a[3-5,8],b1
    first_node = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).replace(" ", ",").split(",")[0]
    port = 15000 + int(os.environ["SLURM_JOB_ID"][-4:]) if "SLURM_JOB_ID" in os.environ else 12910
    return os.environ.get("MASTER_ADDR", first_node), int(os.environ.get("MASTER_PORT", port))
