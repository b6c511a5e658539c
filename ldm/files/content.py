"""Hashes of files' contents, whatever the files' names, sizes and times are: copies have the same.

The hash of large files is computed once and kept below LDM_CACHE/hashes, until the file system says that one of them was written,
replaced, moved or touched: an inode's change time cannot be set back. Then they are read again.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ldm.files.cache import cache_folder
from ldm.files.whole import whole

THREADS = 8
LARGE = 2**30  # bytes from which on a hash is kept: to read as much takes a second
RECENT = 2.0  # seconds after a change in which another may have the same time


def digest_of(words: Sequence[str]) -> str:
    """Words, in order -> sha256, in hex."""
    return hashlib.sha256("\n".join(words).encode(errors="surrogateescape")).hexdigest()


def files_content(files: Sequence[Path], home: Path) -> str:
    """Files below `home`, in their order -> sha256, in hex, over their names there and all their bytes.

    Raises:
        OSError: one cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(file_content, files)
        return digest_of([f"{file.relative_to(home).as_posix()} {sha256}" for file, sha256 in zip(files, hashes)])


def file_content(path: str | Path) -> str:
    """-> sha256, in hex, over a file's bytes."""

    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered([Path(path)], ["bytes"], read)


def remembered(files: Sequence[Path], words: Sequence[str], make: Callable[[], str]) -> str:
    """-> make(), a hash of files, from the cache where they are large and have not changed since it was computed.

    `words` are what else it depends on.
    """
    stats = [os.stat(file) for file in files]
    if sum(stat.st_size for stat in stats) < LARGE:
        return make()
    states = [f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for s in stats]
    place = cache_folder() / "hashes" / digest_of([*words, *states])[:32]
    if place.is_file():
        return place.read_text(encoding="ascii")
    sha256 = make()
    if time.time() - max(stat.st_ctime for stat in stats) > RECENT:
        try:
            with whole(place) as part:
                part.write_text(sha256, encoding="ascii")
        except OSError:
            pass  # where nothing can be kept it is computed again each time
    return sha256
