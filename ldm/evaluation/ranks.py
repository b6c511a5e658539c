"""Evaluation on several processes: who they are, waiting for each other, and telling all what one found."""

import datetime
import os
from typing import Any

import torch.distributed as dist


def start() -> None:
    """Joins the processes that torchrun started, if it did. They meet over gloo, also on GPUs: only words are exchanged."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _many() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _many() else 1


def wait() -> None:
    """Until all processes are here."""
    if _many():
        dist.barrier()


def told(value: Any) -> Any:
    """What process 0 has, on every process."""
    if not _many():
        return value
    words = [value]
    dist.broadcast_object_list(words, src=0)
    return words[0]


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()
