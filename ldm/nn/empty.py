"""Networks built without memory for their weights, into which loading puts them: there is never a second copy."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

REGISTER = nn.Module.register_parameter
PLANNED = False


@contextmanager
def weightless() -> Iterator[None]:
    """A context in which new modules' parameters are on the meta device; buffers and all other tensors are as usual."""
    with _registering(_on_meta):
        yield


@contextmanager
def weighted() -> Iterator[None]:
    """A context within `weightless` in which modules are built with memory again, for those that load their own weights."""
    with _registering(REGISTER):
        yield


@contextmanager
def planned() -> Iterator[None]:
    """A context, `weightless`, in which no tower reads its published weights either: what is built is only reckoned with."""
    global PLANNED
    before, PLANNED = PLANNED, True
    try:
        with weightless():
            yield
    finally:
        PLANNED = before


def is_planned() -> bool:
    """Whether what is built is only reckoned with."""
    return PLANNED


def is_weightless() -> bool:
    """Whether modules are built without memory now."""
    return nn.Module.register_parameter is _on_meta


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    empty = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    REGISTER(module, name, empty)


@contextmanager
def _registering(register: object) -> Iterator[None]:
    before, nn.Module.register_parameter = nn.Module.register_parameter, register
    try:
        yield
    finally:
        nn.Module.register_parameter = before
