"""Writes samples as tar shards in img2dataset's layout: 00000.tar beside 00000_stats.json, and so on.

The folder appears under its name only when it is whole; a crash leaves at most a hidden folder `.NAME-...` beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from ldm.data.decode import decoder


def write_shards(samples: Iterable[Mapping[str, Any]], folder: str | Path, per_shard: int = 1000) -> list[str]:
    """Writes samples into `folder`, which must not be there yet.

    Args:
        samples: {"__key__": str, member: bytes, str (txt), int (cls), dict (json) or np.ndarray (npy)}.
        per_shard: samples of a shard.

    Returns:
        paths of the shards. If another process finished the same folder first, that one stays.

    Raises:
        FileExistsError: the folder is there already.
        ValueError: no samples, or a member that could not be read back.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it, or write to another folder.")
    part = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        _write_all(samples, part, per_shard)
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(str(path) for path in folder.glob("*.tar"))


def _write_all(samples: Iterable[Mapping[str, Any]], folder: Path, per_shard: int) -> None:
    remaining = iter(samples)
    for number in itertools.count():
        chunk = list(itertools.islice(remaining, per_shard))
        if not chunk:
            break
        _write_shard(chunk, folder / f"{number:05d}.tar")
    if number == 0:
        raise ValueError(f"There are no samples to write into {folder.name}.")


def _write_shard(samples: list[Mapping[str, Any]], path: Path) -> None:
    start = time.time()
    with path.open("wb") as file:
        with TarWriter(file, mtime=0) as tar:
            for sample in samples:
                for member in sample.keys() - {"__key__"}:
                    decoder(member)  # refuses what could not be read back
                tar.write(dict(sample))
        file.flush()
        os.fsync(file.fileno())
    stats = {
        "count": len(samples),
        "successes": len(samples),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": {"success": len(samples)},
    }
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")


def _move(part: Path, folder: Path) -> None:
    """Gives the finished folder its name, unless another process was faster."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
