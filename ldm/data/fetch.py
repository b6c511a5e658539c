"""Brings remote shards (s3, gs, http) into a bounded folder of this node; local shards stay where they are.

A shard is fetched whole under a temporary name, its size compared, then renamed, so that a file in the cache is a whole one.
A file lock lets one rank fetch what the others wait for. Room is made by deleting what was used longest ago; a process
that has such a file open reads on.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec
from aiohttp import ClientError
from filelock import FileLock

CACHE = os.environ.get("LDM_CACHE", "~/.cache/ldm")
SCHEMES = ("s3", "gs", "http", "https")
_REMOTE = re.compile(rf"({'|'.join(SCHEMES)})://")
ATTEMPTS = 6
FAULTS = (OSError, ValueError, ClientError)  # what the file systems of fsspec raise when a transfer fails


def is_remote(address: str) -> bool:
    """Whether an address is one of SCHEMES."""
    return bool(_REMOTE.match(address))


def list_remote(pattern: str) -> list[str]:
    """The addresses that a pattern with `*` finds."""
    system, path = fsspec.core.url_to_fs(pattern)
    return [system.unstrip_protocol(found) for found in system.glob(path)]


class Fetch:
    """address -> local path.

    Args:
        cache: folder; remote shards lie in `shards` below it.
        gigabytes: what they may fill.
        wait: seconds before the second attempt; each later one waits twice as long.
    """

    def __init__(self, cache: str | Path = CACHE, gigabytes: float = 100.0, wait: float = 1.0) -> None:
        self.folder = Path(cache).expanduser() / "shards"
        self.gigabytes, self.wait = gigabytes, wait

    def __call__(self, address: str) -> str:
        """The shard's path on this machine, fetched where it is remote and not there yet.

        Raises:
            OSError: it could not be fetched, after several attempts.
        """
        if not is_remote(address):
            return address
        path = self.folder / hashlib.sha256(address.encode()).hexdigest()[:16] / address.rpartition("/")[2]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path.parent}.lock"):
                if not path.is_file():
                    self._patiently(address, lambda: self._fetch(address, path))
        os.utime(path)
        return str(path)

    def stamp(self, address: str) -> str:
        """A word that changes when the shard does: its size, and when it was written."""
        if not is_remote(address):
            stat = os.stat(address)
            return f"{stat.st_size} {stat.st_mtime_ns}"
        info = self._patiently(address, lambda: _info(address))
        return " ".join(str(info.get(name)) for name in ("size", "ETag", "etag", "mtime", "LastModified") if info.get(name))

    def _fetch(self, address: str, path: Path) -> None:
        system, remote = fsspec.core.url_to_fs(address)
        wanted = _info(address)["size"]
        self._make_room(wanted or 0)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            system.get_file(remote, str(part))
            size = part.stat().st_size
            if wanted is not None and size != wanted:
                raise OSError(f"{size} bytes came of {wanted}")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        with FileLock(self.folder / "room.lock"):
            kept = sorted(self.folder.glob("*/*.tar"), key=lambda file: file.stat().st_mtime)
            free = self.gigabytes * 1e9 - sum(file.stat().st_size for file in kept) - size
            for file in kept:
                if free >= 0:
                    break
                free += file.stat().st_size
                shutil.rmtree(file.parent, ignore_errors=True)

    def _patiently(self, address: str, work: Any) -> Any:
        """The work's result, after as many attempts as it takes, up to ATTEMPTS."""
        for attempt in range(ATTEMPTS):
            try:
                return work()
            except FAULTS as error:
                if attempt + 1 == ATTEMPTS or isinstance(error, FileNotFoundError | PermissionError):
                    raise OSError(f"{address} could not be fetched in {attempt + 1} attempts: {error!r}") from error
                time.sleep(self.wait * 2**attempt)


def _info(address: str) -> dict[str, Any]:
    system, path = fsspec.core.url_to_fs(address)
    return system.info(path)
