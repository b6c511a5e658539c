"""All uses of Lightning's private members, so that a release of Lightning without them is named at once.

It is among the files because data and training both need it; it imports nothing of Lightning.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ldm.errors import Refusal

WANTED = "pytorch-lightning >= 2.6, < 2.7"  # as pyproject.toml has it


def reach(owner: Any, name: str) -> Any:
    """-> owner.name, a member that a release of Lightning may take away.

    Raises:
        Refusal: there is none.
    """
    if not hasattr(owner, name):
        installed = f"found {version('pytorch-lightning')}, whose {type(owner).__name__} has no {name}"
        raise Refusal(f"ldm needs {WANTED}; {installed}. Install such a one.")
    return getattr(owner, name)


def replace(owner: Any, name: str, value: Any) -> None:
    """Sets owner.name, which must exist.

    Raises:
        Refusal: there is none.
    """
    reach(owner, name)
    setattr(owner, name, value)


def listen_with(trainer: Any, listen: Callable[[], None]) -> None:
    """Replaces Lightning's installation of signal handlers by `listen`, and drops its broadcast of signals at every step."""
    replace(reach(trainer, "_signal_connector"), "register_signal_handlers", listen)
    replace(reach(reach(trainer, "fit_loop"), "epoch_loop"), "_broadcast_sigterm_tensor", lambda: None)


def are_logs_due(trainer: Any) -> bool:
    """Whether this step's numbers are logged."""
    return reach(reach(trainer, "_logger_connector"), "should_update_logs")


def begin_step_anew(trainer: Any) -> None:
    """Makes Lightning forget the micro-batches of the step under way, so that it begins again."""
    progress = reach(reach(reach(reach(trainer, "fit_loop"), "epoch_loop"), "batch_progress"), "current")
    lost = reach(progress, "ready") % trainer.accumulate_grad_batches
    for name in ("ready", "started", "processed", "completed"):
        replace(progress, name, reach(progress, name) - lost)


def scaler_of(trainer: Any) -> Any | None:
    """-> the gradient scaler of fp16; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)
