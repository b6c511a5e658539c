"""What `git clone` leaves in the place of a large file where Git LFS is not installed: a few words that point to it."""

from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins so is one."""
    return head.startswith(LFS)


def instead_of(path: Path) -> str:
    """-> for an error about a file that cannot be read, what it is, where it is a pointer; nothing where it is none."""
    with path.open("rb") as file:
        pointed = is_pointer(file.read(len(LFS)))
    return " It is a pointer of Git LFS in the place of the file: `git lfs pull` fetches that." if pointed else ""
