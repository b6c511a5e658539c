"""Where a command computes."""

import torch

from ldm.errors import Refusal


def device_of(name: str) -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, `mps` -> the device.

    Raises:
        Refusal: no such device is here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # torch says each in its own way
        why = str(error).splitlines()[0]
        raise Refusal(f"device={name} cannot be used here: {why} Use device=auto or device=cpu.") from error
