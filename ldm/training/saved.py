"""Checkpoints as they are read, and the search for the newest good one; without Lightning, which only training needs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.errors import NotFound, Refusal
from ldm.files.folder import LaterFormat, present
from ldm.files.process import warn
from ldm.files.whole import remove_halves

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PLAIN = "plain.pt"  # what of a sharded checkpoint is no tensor


def read_checkpoint(path: Path, device: Any = "cpu", lazily: bool = False) -> dict[str, Any]:
    """Reads tensors and plain containers; `lazily` leaves the tensors' numbers on the disk until they are used.

    Raises:
        Refusal: the file is damaged, cannot be read, holds code, or is of a later format.
    """
    try:
        if path.is_dir():
            checkpoint = check_folder(path) if lazily else read_folder(path)
        else:
            checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=lazily)
    except Exception as error:  # what damaged bytes may raise has no end: KeyError, IndexError, TypeError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(f"{path} is no whole checkpoint of this framework ({reason}). Take another with resume=PATH.") from error
    if "state_dict" not in checkpoint or "global_step" not in checkpoint:
        raise Refusal(f"{path} is no training checkpoint: it holds {sorted(checkpoint)[:5]}, not state_dict and global_step.")
    return present(checkpoint, path)


def newest(folder: Path) -> Path | None:
    """The newest good checkpoint below a folder, or None; a damaged one is named and passed over.

    One that another process removes meanwhile, since a newer one is there, is none.

    Raises:
        LaterFormat: it was written by a later version, which is no damage.
    """
    times = {path: _written(path) for path in folder.rglob("*.ckpt")}
    for path in sorted((path for path, time in times.items() if time is not None), key=times.__getitem__, reverse=True):
        try:
            read_checkpoint(path, lazily=True)
            if path.is_file():
                _check_bits(path)
            return path
        except LaterFormat:
            raise
        except ValueError as error:
            warn(f"{error} The one before it is taken instead.")
    return None


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _check_bits(path: Path) -> None:
    """Reads all of a file and compares the checksums that lie in it; torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip() is not None
    except (zipfile.BadZipFile, NotImplementedError, OSError):  # of its list of contents
        changed = True
    if changed:
        raise Refusal(f"{path} has changed since it was written: its checksums are others.")


def resume_from(resume: str, folder: Path) -> Path | None:
    """What `resume` means: auto (the newest good checkpoint, or a fresh start), never, or a path.

    Raises:
        NotFound: a path that is not there, or a folder without a checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        remove_halves(folder, "*.ckpt")
        return newest(folder)
    if not Path(resume).exists():
        raise NotFound(f"resume={resume}: there is no such file. Use auto, never, or a path to a .ckpt file.")
    checkpoint = newest(Path(resume)) if Path(resume).is_dir() else Path(resume)
    if checkpoint is None:
        raise NotFound(f"resume={resume}: there is no good checkpoint in this folder. Use auto, never, or a path to a .ckpt.")
    return checkpoint


def mapped(value: Any, change: Callable[[str, Tensor], Any], place: str = "") -> Any:
    """Plain containers with every tensor changed, which is told by its place in them."""
    if isinstance(value, Tensor):
        return change(place, value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change, f"{place}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change, f"{place}/{i}") for i, item in enumerate(value))
    return value


def check_folder(path: Path) -> dict[str, Any]:
    """What of a folder is no tensor, its tensors empty; no more than one of them is held at a time, and its checksum compared.

    Raises:
        ValueError, OSError, pickle.UnpicklingError: the folder is damaged.
    """
    import torch.distributed.checkpoint as dcp  # slow to import, and few checkpoints are folders

    for place in dcp.FileSystemReader(path).read_metadata().storage_data.values():
        with (path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            with zipfile.ZipFile(BytesIO(file.read(place.length))) as archive:
                if archive.testzip() is not None:
                    raise Refusal(f"{place.relative_path} has changed since it was written")
    return torch.load(path / PLAIN, weights_only=True)


def read_folder(path: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Reads a folder that `write_folder` wrote: this rank's part on a mesh, all of it without one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, empty

    plain = torch.load(path / PLAIN, weights_only=True)
    sharded, tensors = set(plain.pop("sharded")), {}

    def room(place: str, tensor: Tensor) -> Tensor:
        split = mesh is not None and place in sharded
        shape = tuple(tensor.shape)
        made = empty(shape, dtype=tensor.dtype, device_mesh=mesh, placements=[Shard(0)]) if split else None
        tensors[place] = torch.empty(shape, dtype=tensor.dtype) if made is None else made
        return tensors[place]

    checkpoint = mapped(plain, room)
    dcp.load(tensors, checkpoint_id=path, no_dist=mesh is None)
    return checkpoint
