"""Networks without memory for their weights, which loading then puts in place: there is never a second copy."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

REGISTER = nn.Module.register_parameter


@contextmanager
def weightless() -> Iterator[None]:
    """Within it, new modules' parameters are on the meta device; buffers and all other tensors are as ever."""
    with _registering(_on_meta):
        yield


@contextmanager
def weighted() -> Iterator[None]:
    """Within `weightless`, modules whose weights are loaded by others' code are made as ever."""
    with _registering(REGISTER):
        yield


def is_weightless() -> bool:
    """Whether modules are made without memory now."""
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
