"""What a shard holds, as a hash: by what is in it and not by what it is called, how large it is, or when it was written. Who
copies or touches it has the same; who writes another has another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

WHOLE = 2**16  # bytes up to which a member of a shard is read whole; of a larger one the first and the last half of so many


def shard_content(path: str | Path, keys: Sequence[str], spans: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> str:
    """One shard -> sha256, in hex, over each sample's key and its members' names, sizes and bytes.

    Captions, labels, records and small pictures are read whole; of a member of more than WHOLE bytes the first and the last half
    of so many, so that a shard of large pictures need not be read through. A change between these that keeps the size is missed.

    Args:
        spans: member -> offsets and sizes in bytes, one for each key; offset -1 where a sample lacks it.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for row, key in enumerate(keys):
            digest.update(json.dumps(key).encode())
            for member, (offsets, sizes) in spans.items():
                offset, size = int(offsets[row]), int(sizes[row])
                if offset >= 0:
                    digest.update(f"\n{member} {size} ".encode())
                    for start, length in ((offset, size),) if size <= WHOLE else _ends(offset, size):
                        digest.update(os.pread(file.fileno(), length, start))
    return digest.hexdigest()


def _ends(offset: int, size: int) -> tuple[tuple[int, int], ...]:
    return (offset, WHOLE // 2), (offset + size - WHOLE // 2, WHOLE // 2)
