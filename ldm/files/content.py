"""What files hold, as hashes: by what is in them and not by what they are called, how large they are, or when they were written.
Who copies or touches files has the same.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS = 8


def digest_of(words: Sequence[str]) -> str:
    """Words -> sha256, in hex."""
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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
