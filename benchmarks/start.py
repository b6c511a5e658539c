"""Seconds of CPU until a command answers:  python -m benchmarks.start

Fresh processes; the median of 5 goes into docs/benchmarks.md.
"""

import os
import resource
import statistics
import subprocess
import sys

from benchmarks.page import put

COMMANDS = {
    "`python train.py --help`": ["train.py", "--help"],
    "`python sample.py --help`": ["sample.py", "--help"],
    "`python train.py +backbone.widht=8`: a mistake is named": ["train.py", "runs=/nowhere", "+backbone.widht=8"],
    "`import torch`, for comparison": ["-c", "import torch"],
    "`import torch, pytorch_lightning`, for comparison": ["-c", "import torch, pytorch_lightning"],
    "`import ldm.build`: what `sample` and `evaluate` begin with": ["-c", "import ldm.build"],
}


def main():
    """Writes the table."""
    for name, command in COMMANDS.items():
        row = [name, f"{statistics.median(seconds(command) for _ in range(5)):.2f}"]
        print(*row, sep=" | ", flush=True)
        put("Starting", ["what", "CPU (s)"], row)


def seconds(command):
    """-> seconds of CPU that a fresh process and its children used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    ran = subprocess.run([sys.executable, *command], env=environment, **quiet)
    assert ran.returncode == 0 or "error: backbone.widht" in ran.stderr, ran.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
