"""Several processes at once, forked from this one: nothing is imported again."""

import multiprocessing
import os
import sys

import torch

from helpers.port import free_port


def together(task, environments, folder, timeout=600):
    """Calls `task` in a process for each environment, which is added to this one's; -> their exit codes and what they printed."""
    files = [folder / f"printed-{i}.txt" for i in range(len(environments))]
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=_alone, args=(task, *pair)) for pair in zip(environments, files)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout)
        job.kill()  # one that did not end
        job.join()
    return [job.exitcode for job in jobs], [file.read_text() for file in files]


def torchrun(count):
    """What torchrun tells each of its processes."""
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    told |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [told | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def _alone(task, environment, file):
    os.environ.update(environment)
    torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
    with file.open("w", buffering=1) as sys.stdout:
        task()
