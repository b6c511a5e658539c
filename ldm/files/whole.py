"""Atomic writes: files and folders are written beside their place, flushed to the disk, and then renamed."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.errors import NotWritten, Refusal

UMASK = os.umask(0)
os.umask(UMASK)
END = ".part"  # of files that are being written, or were when their process was killed: `.NAME.SOMETHING.part` beside NAME


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A context with a temporary path; the file that the block writes there becomes `path` if the block raises nothing.

    Raises:
        OSError: it could not be written; a file that was at `path` before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{END}")
    try:
        yield part
        _to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole`, for a folder, which the block finds empty. If another process has written the same folder by the end of the
    block, that one is kept.

    Raises:
        NotWritten: the folder could not be made. OSError: something in it could not be written.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{END}")
    with saving(path):
        part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _to_disk(file)
        try:
            os.rename(part, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, path: Path) -> None:
    """Renames a finished folder to `path`; a folder that had this name is kept until then, and removed.

    Raises:
        OSError: it could not be renamed; the folder that was at `path` before is still there.
    """
    old = path.with_name(f".{path.name}.old{END}")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path), flushes it to the disk and renames it to `path`.

    Raises:
        NotWritten: nothing could be written; a file that was at `path` before is still there.
    """
    try:
        with whole(path) as part:
            write(part)
    except OSError as error:
        raise _not_written(path, error) from error


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """A context in which any OSError that is no refusal is one of writing `path`.

    Raises:
        NotWritten: there was one.
    """
    try:
        yield
    except Refusal:
        raise
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> NotWritten:
    return NotWritten(
        f"{path} could not be written ({error.strerror or error}); nothing that was saved before is lost. Free space, or choose "
        "another place (runs=FOLDER, out=FOLDER)"
    )


def remove_halves(folder: Path, pattern: str) -> None:
    """Removes what killed processes left half written below a folder, of files and folders whose name matches `pattern`."""
    for half in list(folder.rglob(f".{pattern}*{END}")):
        shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)


def _to_disk(file: Path) -> None:
    """Flushes a file, and lets those read it who may read others of this process: safetensors keeps its own from them."""
    with suppress(OSError):  # a mount without such modes
        file.chmod(0o666 & ~UMASK)
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
