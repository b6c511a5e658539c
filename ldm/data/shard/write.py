"""Writes samples as tar shards in img2dataset's layout: 00000.tar beside 00000_stats.json, and so on.

A shard appears under its name only when it is whole, and so does a folder of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from ldm.data.shard.decode import decoder
from ldm.errors import AlreadyThere, Refusal
from ldm.files.folder import write_json
from ldm.files.whole import saving, whole, whole_folder


def write_shards(samples: Iterable[Mapping[str, Any]], folder: str | Path, per_shard: int = 1000) -> list[str]:
    """Writes samples into `folder`, which must not be there yet and appears when all is written.

    Args:
        samples: {"__key__": str, member: bytes, str (txt), int (cls), dict (json) or np.ndarray (npy)}.
        per_shard: samples of a shard.

    Returns:
        paths of the shards. If another process finished the same folder first, that one stays.

    Raises:
        AlreadyThere: the folder is there already. NotWritten: it could not be written.
        ValueError: no samples, or a member that could not be read back.
    """
    folder = Path(folder)
    if folder.exists():
        raise AlreadyThere(f"{folder} is there already; remove it, or write to another folder.")
    with saving(folder), whole_folder(folder) as part:
        _write_all(samples, part, per_shard)
    return sorted(str(path) for path in folder.glob("*.tar"))


def write_shard(samples: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes one shard and its statistics, the tar last; -> its number of samples.

    Raises:
        Refusal: no samples, or a member that could not be read back.
    """
    start, count = time.time(), 0
    with whole(path) as part:
        with part.open("wb") as file, TarWriter(file, mtime=0) as tar:
            for sample in samples:
                count += 1
                for member in sample.keys() - {"__key__"}:
                    decoder(member)  # refuses what could not be read back
                tar.write(dict(sample))
        if not count:
            raise Refusal(f"There are no samples to write into {path}.")
        _write_statistics(path, count, start)
    return count


def _write_all(samples: Iterable[Mapping[str, Any]], folder: Path, per_shard: int) -> None:
    remaining = iter(samples)
    for number in itertools.count():
        first = next(remaining, None)
        if first is None:
            break
        write_shard(itertools.chain([first], itertools.islice(remaining, per_shard - 1)), folder / f"{number:05d}.tar")
    if number == 0:
        raise Refusal(f"There are no samples to write into {folder.name}.")


def _write_statistics(path: Path, count: int, start: float) -> None:
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": {"success": count},
    }
    write_json(stats, path.with_name(f"{path.stem}_stats.json"))
