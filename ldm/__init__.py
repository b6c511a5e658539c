"""Latent diffusion. What is offered here (`load`, `train`, ...) is in api.py, which is imported when it is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.api import Pipeline, batches, evaluate, load, train

__all__ = ["Pipeline", "batches", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("ldm.api"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("ldm")
    raise AttributeError(f"module 'ldm' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
