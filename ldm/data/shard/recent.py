"""The things last asked for, kept; the oldest forgotten."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

K, V = TypeVar("K"), TypeVar("V")


class Recent(Generic[K, V]):
    """make(key) -> value, with the `limit` last values kept. Travels to other processes empty."""

    def __init__(self, limit: int, make: Callable[[K], V]) -> None:
        self.limit, self.make = limit, make
        self._kept: OrderedDict[K, V] = OrderedDict()

    def __getitem__(self, key: K) -> V:
        if key not in self._kept:
            value = self.make(key)
            if len(self._kept) >= self.limit:
                self._kept.popitem(last=False)
            self._kept[key] = value
        self._kept.move_to_end(key)
        return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}
