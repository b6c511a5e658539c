"""What is reached for in Lightning beyond what it promises, all of it, so that a release without it is named at once.

It stands on the ground floor because data and training both need it; it imports nothing of Lightning.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ldm.errors import Refusal

WANTED = "pytorch-lightning >= 2.6, < 2.7"  # as pyproject.toml has it


def reach(owner: Any, name: str) -> Any:
    """-> owner.name, for parts and names that a release of Lightning may take away.

    Raises:
        Refusal: it has none.
    """
    if not hasattr(owner, name):
        found = f"found {version('pytorch-lightning')}, whose {type(owner).__name__} has no {name}"
        raise Refusal(f"ldm needs {WANTED}; {found}. Install such a one.")
    return getattr(owner, name)


def replace(owner: Any, name: str, value: Any) -> None:
    """Puts something else in the place of owner.name, which must be there."""
    reach(owner, name)
    setattr(owner, name, value)


def listen_with(trainer: Any, listen: Callable[[], None]) -> None:
    """`listen` takes the place of Lightning's signal handlers, and its broadcast at every step, to look for a signal, goes."""
    replace(reach(trainer, "_signal_connector"), "register_signal_handlers", listen)
    replace(reach(reach(trainer, "fit_loop"), "epoch_loop"), "_broadcast_sigterm_tensor", lambda: None)


def are_logs_due(trainer: Any) -> bool:
    """Whether the loggers want this step's numbers."""
    return reach(reach(trainer, "_logger_connector"), "should_update_logs")


def begin_step_anew(trainer: Any) -> None:
    """The micro-batches of the step under way count as not yet come."""
    progress = reach(reach(reach(reach(trainer, "fit_loop"), "epoch_loop"), "batch_progress"), "current")
    lost = reach(progress, "ready") % trainer.accumulate_grad_batches
    for name in ("ready", "started", "processed", "completed"):
        replace(progress, name, reach(progress, name) - lost)


def scaler_of(trainer: Any) -> Any | None:
    """The gradient scaler of fp16; None in other precisions, whose plugins have none."""
    return getattr(trainer.precision_plugin, "scaler", None)
