"""Brings remote shards (s3, gs, http) into a bounded folder of this node; local shards stay where they are.

A shard is fetched whole, with the statistics and the table that img2dataset puts beside it, into a folder of its own: under a
temporary name, its size compared, then renamed, so that a shard in the cache is a whole one. The folder's lock lets one process
fetch what the others wait for, and keeps the shard until it is open. Room is made by deleting what was used longest ago; a
process that has such a file open reads on.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from warnings import warn

import fsspec
from aiohttp import ClientError, ClientTimeout
from filelock import FileLock, Timeout

from ldm.errors import Refusal, Unreachable
from ldm.files.cache import cache_folder
from ldm.files.whole import whole

CACHE = str(cache_folder())
SCHEMES = ("s3", "gs", "http", "https")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # that fsspec reads them through; it brings the one for http itself
CREDENTIALS = {
    "s3": " s3fs takes credentials from AWS_PROFILE, AWS_ACCESS_KEY_ID or ~/.aws, and another server from AWS_ENDPOINT_URL.",
    "gs": " gcsfs takes credentials from GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`.",
}
_PATIENCE = ClientTimeout(total=None, sock_connect=30, sock_read=60)  # a large shard may take longer than aiohttp's 5 minutes
OPTIONS = {
    "gs": {"session_kwargs": {"timeout": _PATIENCE}},
    "http": {"client_kwargs": {"timeout": _PATIENCE}},
    "https": {"client_kwargs": {"timeout": _PATIENCE}},
}
_REMOTE = re.compile(rf"({'|'.join(SCHEMES)})://")
BESIDE = ("{}_stats.json", "{}.parquet")  # what the index looks for beside 00000.tar
ATTEMPTS = 7
NETWORK = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google")  # whose errors are no OSErrors

T = TypeVar("T")


def is_remote(address: str) -> bool:
    """Whether an address is one of SCHEMES."""
    return bool(_REMOTE.match(address))


def check_remote(address: str, option: str) -> None:
    """Makes sure that what reads an address is installed.

    Raises:
        Refusal: it is not.
    """
    scheme = address.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = PACKAGES.get(scheme, "aiohttp")
        raise Refusal(
            f"{option}={address}: {scheme}:// is read through {package}, which cannot be imported "
            f"({error.__cause__ or error}). pip install {package}"
        ) from error


def list_remote(pattern: str) -> list[str]:
    """The addresses that a pattern with `*` finds.

    Raises:
        OSError: the server does not answer, or refuses.
    """
    system, path = _system(pattern)
    return [system.unstrip_protocol(shard) for shard in patiently(pattern, lambda: system.glob(path))]


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
        """As `held`, for who can do with a path at which the shard may soon be no more."""
        with self.held(address) as path:
            return path

    @contextmanager
    def held(self, address: str) -> Iterator[str]:
        """The shard's path on this machine, fetched where it is remote and not there yet; here it stays until the block ends.

        Raises:
            OSError: it could not be fetched, after several attempts.
        """
        if not is_remote(address):
            yield address
            return
        folder = self._folder(address)
        path = folder / address.rpartition("/")[2]
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not path.is_file():
                patiently(address, lambda: self._fetch(address, path), self.wait)
            os.utime(folder)
            yield str(path)

    def stamp(self, address: str) -> str:
        """A word that changes when the shard does: its size, its times (that of its inode too, which nobody sets), or its tag.
        What the cache had of another state goes.

        Raises:
            OSError: the shard is not there.
        """
        if not is_remote(address):
            stat = os.stat(address)
            return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        stamp, folder = patiently(address, lambda: _stamp(_info(address)), self.wait), self._folder(address)
        if folder.is_dir() and _told(folder) != stamp:
            with FileLock(f"{folder}.lock"):
                shutil.rmtree(folder, ignore_errors=True)
        return stamp

    def _folder(self, address: str) -> Path:
        return self.folder / hashlib.sha256(address.encode()).hexdigest()[:16]

    def _fetch(self, address: str, path: Path) -> None:
        system, remote = _system(address)
        info = _info(address)
        self._make_room(path.parent, _stamp(info))
        for name in BESIDE:
            with suppress(FileNotFoundError):
                beside = name.format(path.stem)
                system.get_file(f"{remote.rpartition('/')[0]}/{beside}", str(path.with_name(beside)))
        with whole(path) as part:
            system.get_file(remote, str(part))
            size = part.stat().st_size
            if info["size"] is not None and size != info["size"]:
                raise OSError(f"{size} bytes came of {info['size']}")

    def _make_room(self, folder: Path, stamp: str) -> None:
        """Deletes other shards, but those that are being fetched or opened, until this one fits; begins its folder."""
        shutil.rmtree(folder, ignore_errors=True)
        with FileLock(self.folder / "room.lock"):
            others = sorted((f for f in self.folder.iterdir() if f.is_dir()), key=_used)
            sizes = [_size(_told(other)) for other in others]
            free = self.gigabytes * 1e9 - sum(sizes) - _size(stamp)
            for other, size in zip(others, sizes):
                if free >= 0 and _told(other):
                    continue
                with suppress(Timeout), FileLock(f"{other}.lock", timeout=0):
                    shutil.rmtree(other, ignore_errors=True)
                    free += size
            folder.mkdir()
            (folder / "stamp").write_text(stamp)


def patiently(address: str, work: Callable[[], T], wait: float = 1.0) -> T:
    """The work's result, after as many attempts as it takes, up to ATTEMPTS, each waiting twice as long as the one before.

    Raises:
        OSError: none succeeded, or another one would be in vain.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except Exception as raised:
            error = _cause(raised)
            if not isinstance(error, OSError | ValueError) and type(error).__module__.partition(".")[0] not in NETWORK:
                raise
            if attempt == ATTEMPTS or _is_final(error):
                hint = CREDENTIALS.get(address.partition("://")[0], "") if _is_refusal(error) else ""
                raise Unreachable(f"{address} could not be read in {attempt} attempts: {error!r}.{hint}") from error
            warn(f"{address}, attempt {attempt} of {ATTEMPTS}: {error!r}. Trying again in {wait:g} s.", stacklevel=2)
            time.sleep(wait)
            wait *= 2
    raise AssertionError


def _cause(error: Exception) -> Exception:
    """For fsspec's http a file is not there whatever went wrong; what did is the cause."""
    hidden = isinstance(error, FileNotFoundError) and isinstance(error.__cause__, ClientError | TimeoutError)
    return error.__cause__ if hidden else error


def _is_final(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or _is_refusal(error) or _status(error) in (400, 404, 410)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or _status(error) in (401, 403) or "Credentials" in type(error).__name__


def _status(error: Exception) -> int | None:
    """HTTP's number, where the error has one."""
    return getattr(error, "status", None) or getattr(error, "code", None)


def _system(address: str) -> tuple[Any, str]:
    """-> the file system of an address, and the path there."""
    return fsspec.core.url_to_fs(address, **OPTIONS.get(address.partition("://")[0], {}))


def _info(address: str) -> dict[str, Any]:
    system, path = _system(address)
    return system.info(path)


def _stamp(info: dict[str, Any]) -> str:
    tags = (info.get(name) for name in ("ETag", "etag", "mtime", "LastModified"))
    return f"{info['size'] or 0} {next(filter(None, tags), '')}"


def _told(folder: Path) -> str:
    """The stamp of what lies in a folder of the cache, "" where it has none."""
    try:
        return (folder / "stamp").read_text()
    except OSError:
        return ""


def _size(stamp: str) -> int:
    return int(stamp.partition(" ")[0] or 0)


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
