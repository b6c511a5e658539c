"""Tar shards in LAION's layout as batches for Lightning, in an order that survives a restart.

A batch is a dict: each of `fields` under its name (pictures uint8 (B, 3, size, size), label maps int64 (B, size, size), texts
and records as lists, classes int64 (B), arrays stacked), `key` list[str], and `position` (B,) int64, the sample's place in the
global order of training. On the device pictures become float32 in [-1, 1]. Trainers need `use_distributed_sampler=False`.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.data.decode import decode, decoder, is_image, is_text
from ldm.data.index import Index, build, expand
from ldm.data.order import Batches, Once
from ldm.types import Batch

Sources = str | Path | Sequence[str | Path]
FIELDS = {"image": "jpg", "caption": "txt"}
OPEN_FILES = 128  # shards a process holds open


class Samples(Dataset[dict[str, Any]]):
    """The samples of some shards by number: {field: value, "key": str}. Files are opened by the process that reads them.

    Args:
        fields: batch field -> member of the sample.
        size: pixels; the shorter side of a picture is brought to it and the middle kept.

    Raises:
        ValueError: a shard is damaged, samples lack a member, or have an empty caption.
    """

    def __init__(self, index: Index, fields: Mapping[str, str], size: int) -> None:
        self.index, self.fields, self.size = index, dict(fields), size
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        for field, member in self.fields.items():
            self._check_present(field, member)
            if is_text(member):
                self._check_spoken(field)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"There is no sample {i} among {len(self)}.")
        sample: dict[str, Any] = {field: self._decode(i, member) for field, member in self.fields.items()}
        return sample | {"key": self.index.keys[i]}

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        return self.index.keys

    def captions(self, field: str = "caption") -> list[str]:
        """All captions, in order, without unpacking a picture."""
        if field not in self.fields:
            raise ValueError(f"The samples have no field {field!r}, only {', '.join(self.fields)}; add +data.fields.{field}=txt.")
        return [self._decode(i, self.fields[field]) for i in range(len(self))]

    def _decode(self, i: int, member: str) -> Any:
        return decode(member, self._read(i, member), self.size, where=self._where(i))

    def _read(self, i: int, member: str) -> bytes:
        offset, size = self.index.spans[member][i].tolist()
        data = os.pread(self._file(int(self.index.shard[i])).fileno(), size, offset)
        if len(data) != size:
            raise ValueError(
                f"Member {member!r} of {self._where(i)} ends after {len(data)} of {size} bytes: the shard has changed."
            )
        return data

    def _file(self, shard: int) -> FileIO:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = FileIO(self.index.shards[shard])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _where(self, i: int) -> str:
        return f"sample {self.index.keys[i]!r} in {self.index.shards[int(self.index.shard[i])]}"

    def _check_present(self, field: str, member: str) -> None:
        spans = self.index.spans.get(member)
        lacking = range(len(self)) if spans is None else (spans[:, 0] < 0).nonzero()[0].tolist()
        if len(lacking):
            raise ValueError(
                f"{len(lacking)} of {len(self)} samples lack member {member!r} for field {field!r}, "
                f"first {self._where(lacking[0])}. "
                f"The shards have {', '.join(self.index.spans)}; set data.fields.{field} to one of these, or remove the field."
            )

    def _check_spoken(self, field: str) -> None:
        silent = [i for i, text in enumerate(self.captions(field)) if not text]
        if silent:
            raise ValueError(
                f"{len(silent)} of {len(self)} samples have an empty {field} (data.fields.{field}), "
                f"first {self._where(silent[0])}. Leave them out of the shards, or give them words."
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}


class Placed(Dataset[dict[str, Any]]):
    """The same samples, asked for as (position, index), which they carry on as `position`."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        position, index = place
        return self.samples[index] | {"position": position}


class Shards(pl.LightningDataModule):
    """Training and validation shards.

    Args:
        train, val: a folder, a tar, a glob, a brace pattern, or a list of these.
        fields: batch field -> member; {"image": "jpg", "caption": "txt"} by default.
        size: pixels of pictures and label maps.
        batch: samples of one optimizer step, over all devices and micro-batches.
        seed: of the order.
        workers: processes that decode, on each device; 0 decodes in the training process.
        on_mismatch: when a checkpoint was trained with other data, seed or batch: "refuse", or "restart_epoch" to begin its
            epoch anew with these.
    """

    def __init__(
        self,
        train: Sources,
        val: Sources | None = None,
        fields: Mapping[str, str] | None = None,
        size: int = 256,
        batch: int = 64,
        seed: int = 0,
        workers: int = 0,
        on_mismatch: Literal["refuse", "restart_epoch"] = "refuse",
    ) -> None:
        super().__init__()
        self.fields = dict(FIELDS if fields is None else fields)
        for field, member in self.fields.items():
            if field in ("key", "position"):
                raise ValueError(f"data.fields.{field}: every batch has `{field}` already; give this field another name.")
            decoder(member)
        if on_mismatch not in ("refuse", "restart_epoch"):
            raise ValueError(f"data.on_mismatch={on_mismatch!r}; wanted `refuse` or `restart_epoch`.")
        self.train, self.val, self.size, self.batch = train, val, size, batch
        self.seed, self.workers, self.on_mismatch = seed, workers, on_mismatch
        self.consumed = 0  # samples that training had taken where this run begins
        self._ahead = 0  # consumed samples beyond global_step * batch, after an epoch was begun anew

    @cached_property
    def train_set(self) -> Samples:
        """The training samples; reads the shards' headers at first."""
        return Samples(build(expand(self.train, "data.train")), self.fields, self.size)

    @cached_property
    def val_set(self) -> Samples | None:
        """The validation samples, None without data.val."""
        return None if self.val is None else Samples(build(expand(self.val, "data.val")), self.fields, self.size)

    def setup(self, stage: str | None = None) -> None:
        """Reads the headers of all shards and checks that every sample has what `fields` names."""
        _ = self.train_set, self.val_set

    def train_dataloader(self) -> DataLoader:
        """Endless micro-batches of this device, from sample `consumed` on."""
        rank, world, accumulate = self._share()
        order = Batches(len(self.train_set), self.batch, rank, world, accumulate, self.seed, self.consumed)
        return self._load(self.train_set, order)

    def val_dataloader(self) -> DataLoader | list:
        """Every validation sample once over all devices, in order; position = index. Empty without data.val."""
        rank, world, accumulate = self._share()
        return [] if self.val_set is None else self.ordered("val", self.batch // accumulate, rank, world)

    def ordered(self, split: Literal["train", "val"], batch: int, rank: int = 0, world: int = 1) -> DataLoader:
        """Every sample of a split once, in order, `batch` at a time over all `world` processes; position = index."""
        samples = {"train": self.train_set, "val": self.val_set}[split]
        if samples is None:
            raise ValueError("There are no validation samples; set data.val.")
        return self._load(samples, Once(len(samples), batch, rank, world))

    def rows(self, split: Literal["train", "val"], chosen: Sequence[int]) -> Batch:
        """The chosen samples of a split as one batch; position = index."""
        samples = Placed({"train": self.train_set, "val": self.val_set}[split])
        return collate([samples[i, i] for i in chosen])

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Pictures uint8 (B, 3, H, W) -> float32 in [-1, 1], channels last; all else stays."""
        pictures = [field for field, member in self.fields.items() if is_image(member) and field in batch]
        return {**batch, **{field: to_float(batch[field]) for field in pictures}}

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, the same on every rank, in plain Python."""
        step = self.trainer.global_step if self.trainer else 0
        return {
            "consumed": step * self.batch + self._ahead,
            "step": step,
            "count": len(self.train_set),
            "seed": self.seed,
            "batch": self.batch,
            "fingerprint": self.train_set.index.fingerprint(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint stopped.

        Raises:
            ValueError: it was trained with another seed, batch or data set, and `on_mismatch` is "refuse".
        """
        mine = self.state_dict()
        other = [name for name in ("seed", "batch", "fingerprint") if state_dict[name] != mine[name]]
        self.consumed = state_dict["consumed"]
        if other:
            changes = ", ".join(f"{name} {state_dict[name]} there, {mine[name]} here" for name in other)
            if self.on_mismatch == "refuse":
                raise ValueError(
                    f"The checkpoint's order of samples is not this run's: {changes}. Give the run what the checkpoint had "
                    "(data.seed, data.batch, data.train), or begin its epoch anew: data.on_mismatch=restart_epoch."
                )
            epoch = state_dict["consumed"] // state_dict["count"]
            self.consumed = epoch * len(self.train_set)
            rank_zero_warn(f"The checkpoint's order of samples is not this run's: {changes}. Beginning epoch {epoch} anew.")
        self._ahead = self.consumed - state_dict["step"] * self.batch

    def _share(self) -> tuple[int, int, int]:
        """-> rank, number of ranks, micro-batches of a step."""
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def _load(self, samples: Samples, order: Sampler[list[tuple[int, int]]]) -> DataLoader:
        return DataLoader(
            Placed(samples),
            batch_sampler=order,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tensors are stacked, integers become int64 (B), all else a list."""
    return {field: _join(field, [sample[field] for sample in samples]) for field in samples[0]}


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) in [-1, 1], channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def _join(field: str, values: list[Any]) -> Any:
    if isinstance(values[0], int):
        return torch.tensor(values, dtype=torch.int64)
    if not isinstance(values[0], Tensor):
        return values
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"Field {field!r} has arrays of shapes {sorted(shapes)}, which share no batch (data.fields.{field}).")
    return torch.stack(values)
