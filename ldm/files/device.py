"""The device that a command computes on."""

import torch

from ldm.errors import Refusal
from ldm.files.process import process


def device_of(name: str) -> torch.device:
    """`auto` (a GPU where there is one, another for each of several processes), `cpu`, `cuda`, `cuda:1`, `mps` -> the device.

    Raises:
        Refusal: this machine has no such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        here = process()
        return torch.device("cuda", here.local % torch.cuda.device_count()) if here.world > 1 else torch.device("cuda")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # torch says each in its own way
        why = str(error).splitlines()[0]
        raise Refusal(f"device={name} cannot be used here: {why} Use device=auto or device=cpu.") from error
