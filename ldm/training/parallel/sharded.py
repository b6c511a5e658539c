"""Weights, gradients, averages and the optimizer's state shared out over the ranks (FSDP2), and their checkpoints.

A checkpoint is one file, the same as without sharding, so that a run may go on either way; or, for models that no single host
holds, a folder to which every rank writes its part. Either is read on any number of ranks.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ldm.errors import NotWritten
from ldm.files.folder import present
from ldm.files.lightning import replace
from ldm.files.process import rank
from ldm.files.whole import END, replace_folder
from ldm.training.callback.compile import blocks_of
from ldm.training.saved import PLAIN, mapped, read_folder

FOLDER = "folder"  # what the strategy tells the checkpoint plugin where all ranks write


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
        state, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        placed = {name: placed_as(value, state[name]) if name in state else value for name, value in given.items()}
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
