"""Weights, gradients, averages and the optimizer's state shared out over the ranks (FSDP2), and their checkpoints.

A checkpoint is one file, the same as without sharding, so that a run may go on either way; or, for models that no single host
holds, a folder to which every rank writes its part. Either is read on any number of ranks.
"""

import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty
from torch.optim import Optimizer

from ldm.errors import NotWritten, Refusal
from ldm.files.folder import present
from ldm.files.lightning import replace
from ldm.files.process import rank
from ldm.files.whole import END, replace_folder
from ldm.training.callback.compile import blocks_of

FOLDER = "folder"  # what the strategy tells the checkpoint plugin where all ranks write
PLAIN = "plain.pt"  # what of a sharded checkpoint is no tensor


class Sharded(ModelParallelStrategy):
    """`trainer=fsdp`. With `folders`, each rank writes its part of a checkpoint, and nobody gathers it."""

    def __init__(self, folders: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=folders)
        self.folders = folders

    lightning_restore_optimizer = True

    def setup_environment(self) -> None:
        """All ranks are one group."""
        replace(self, "_data_parallel_size", self.num_nodes * self.num_processes)
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it gradients add up on each rank; they are reduced with the last micro-batch."""
        parts = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Each rank's part."""
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Each rank's part."""
        return (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a file on rank 0, or a folder on all ranks."""
        path = Path(self.broadcast(filepath))
        if self.folders:
            self.checkpoint_io.save_checkpoint(checkpoint, path, FOLDER)
            return
        checkpoint = mapped(checkpoint, lambda _, tensor: whole(tensor, self.is_global_zero))
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A file as it is, a folder as this rank's part of it."""
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path)
        return present(read_folder(path, self.device_mesh["data_parallel"]), path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Shares the weights out."""
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        placed = {name: placed_as(value, own[name]) if name in own else value for name, value in given.items()}
        self.lightning_module.load_state_dict(placed, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shares the optimizer's state out as its weights are."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            for number, values in state["state"].items():
                state["state"][number] = mapped(values, lambda _, x, like=weights[number]: placed_as(x, like))
            optimizer.load_state_dict(state)


def shard(parts: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shares out the weights of some networks, and of the blocks that they list, each gathered when it is run."""
    for part in parts:
        for block in blocks_of(part):
            if block is not part:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """All of a tensor that is shared out, on the processor; all ranks must ask, those that do not `keep` it get nothing."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.detach().full_tensor()
    return full.cpu() if keep else full.new_empty(0)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it every rank holds all weights of what is shared out, so that one may run it more often than another, or never.

    Whoever asks the module for its state shares them out again.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, shared out as `like` is, where it is of its shape."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def mapped(value: Any, change: Callable[[str, Tensor], Any], place: str = "") -> Any:
    """Plain containers with every tensor changed, which is told by its place in them."""
    if isinstance(value, Tensor):
        return change(place, value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change, f"{place}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change, f"{place}/{i}") for i, item in enumerate(value))
    return value


def write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint as a folder, each rank its part; it appears whole or not at all.

    Raises:
        OSError: nothing could be written, on all ranks alike; what stood at `path` before still stands.
    """
    part, tensors = path.with_name(f".{path.name}{END}"), {}  # one name on all ranks

    def put(place: str, tensor: Tensor) -> Tensor:
        tensors[place] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    plain = mapped(checkpoint, put)
    plain["sharded"] = [place for place, tensor in tensors.items() if isinstance(tensor, DTensor)]
    first = rank() == 0
    try:
        if first:
            shutil.rmtree(part, ignore_errors=True)
        dcp.save(tensors, checkpoint_id=part)
        reason = [_put_in_place(plain, part, path) if first else None]
        torch.distributed.broadcast_object_list(reason)
    except CheckpointException as error:
        reason = [str(next(iter(error.failures.values()))[0])]
    if reason[0] is not None:
        if first:
            shutil.rmtree(part, ignore_errors=True)
        raise NotWritten(f"{path} could not be written ({reason[0]}); nothing that was saved before is lost")


def _put_in_place(plain: dict[str, Any], part: Path, path: Path) -> str | None:
    """Completes a folder and gives it its name; -> why that could not be."""
    try:
        torch.save(plain, part / PLAIN)
        replace_folder(part, path)
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def check_folder(path: Path) -> dict[str, Any]:
    """What of a folder is no tensor, its tensors empty; no more than one of them is held at a time, and its checksum compared.

    Raises:
        ValueError, OSError, pickle.UnpicklingError: the folder is damaged.
    """
    for place in dcp.FileSystemReader(path).read_metadata().storage_data.values():
        with (path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            with zipfile.ZipFile(BytesIO(file.read(place.length))) as archive:
                if archive.testzip() is not None:
                    raise Refusal(f"{place.relative_path} has changed since it was written")
    return torch.load(path / PLAIN, weights_only=True)


def read_folder(path: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Reads a folder that `write_folder` wrote: this rank's part on a mesh, all of it without one."""
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
