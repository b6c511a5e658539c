"""The networks, parts, layouts and kinds of adapters that are known: one file each in a folder of theirs, found by listing it."""

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Any

import ldm.interop.adapter
import ldm.interop.layout
import ldm.interop.network
import ldm.interop.part
from ldm.errors import Refusal
from ldm.interop.bundle import Bundle
from ldm.interop.protocols import AdapterKind, Layout, Network, Part


def networks() -> list[Network]:
    """Every network, by the name of its file."""
    return _listed(ldm.interop.network, "NETWORK")


def parts() -> list[Part]:
    """Every kind of part, by the name of its file."""
    return _listed(ldm.interop.part, "PART")


def layouts() -> list[Layout]:
    """Every layout, by the name of its file."""
    return _listed(ldm.interop.layout, "LAYOUT")


def adapter_kinds() -> list[AdapterKind]:
    """Every kind of adapter, by the name of its file."""
    return _listed(ldm.interop.adapter, "KIND")


def network_of(bundle: Bundle) -> Network:
    """The network that a model is built on.

    Raises:
        Refusal: it is none that other layouts know.
    """
    for network in networks():
        if network.builds(bundle):
            return network
    target = bundle.recipe["backbone"]["_target_"]
    names = " and ".join(sorted((network.name for network in networks()), reverse=True))
    raise Refusal(f"backbone={target} has no place in other layouts; {names} have.")


def recognised(names: Iterable[str]) -> Network | None:
    """The network whose tensors are among those of a single file, if any."""
    names = list(names)
    return next((network for network in networks() if network.recognise(names)), None)


def _listed(package: ModuleType, member: str) -> list[Any]:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_")
    return [getattr(import_module(f"{package.__name__}.{name}"), member) for name in names]
