"""Tar shards in LAION's layout as batches, in an order that survives a restart.

A batch is a dict: each of `fields` under its name (pictures uint8 (B, 3, height, width), label maps int64 (B, height, width),
texts and records as lists, classes int64 (B), arrays stacked), `key` list[str], and `position` (B,) int64, the sample's place
in the global order of training. With pictures come `original_height`, `original_width`, `crop_top`, `crop_left`,
`target_height`, `target_width`, int64 (B) in pixels, and `mirrored`, bool (B). On the device pictures become float32 in
[-1, 1], arrays of floats float32. Trainers need `use_distributed_sampler=False`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data._settings import check_settings
from ldm.data.batch.ahead import ahead
from ldm.data.batch.bad import BadSamples
from ldm.data.batch.latents import check_provenance
from ldm.data.batch.mixed import Member, apart
from ldm.data.batch.samples import Loaded, Samples, as_is, loading, to_float
from ldm.data.order.bucket import Report, Size, sizes_of
from ldm.data.order.filter import Count, select
from ldm.data.order.order import Batches, Mixture, Once, Place, Steps, Stream
from ldm.data.order.progress import Progress
from ldm.data.shard.decode import is_image
from ldm.data.shard.fetch import CACHE, Fetch
from ldm.data.shard.index import Damage, Index
from ldm.data.shard.selection import Selection
from ldm.data.shard.source import Sources, expand, owners, passed_over
from ldm.errors import Refusal
from ldm.files.content import digest_of
from ldm.files.lightning import begin_step_anew
from ldm.files.process import warn
from ldm.types import Batch

FIELDS = {"image": "jpg", "caption": "txt"}
Split = Literal["train", "val"]


class Shards:
    """Training and validation shards.

    Args:
        train, val: a folder, a tar, a glob, a brace pattern, an address (s3, gs, http), or a list of these.
        fields: batch field -> member; {"image": "jpg", "caption": "txt"} by default. A field of no member (null) is left out; of
            several texts, {"txt": 0.5, "long.txt": 0.5}, each sample has one, drawn by its position.
        size: pixels of pictures and label maps; of the square of the same area where there are buckets.
        batch: samples of one optimizer step, over all devices and micro-batches.
        seed: of the order, and of `crop` and `flip`.
        workers: processes that decode, on each device; 0 decodes in the training process.
        crop, flip: of training pictures: "center" or "random", and the share that is mirrored.
        filters: what to train on, see filter.py.
        tokens: counts the tokens of captions for `filters`, such as ldm.tower.counter.Counter.
        buckets: sizes of training pictures, see bucket.py; each batch is of one size.
        weights: the shares that the entries of `train` have in every batch; None joins them into one data set.
        window: shards whose samples are mixed.
        lanes: parts of an epoch that are read side by side; as many as there are nodes, each node reads shards of its own.
        damaged: "refuse" damaged shards, or "leave_out" them, naming each.
        max_bad_fraction: training stops when more samples than that cannot be read; fewer are replaced by others and named.
        cache: folder for remote shards, and for indices that cannot lie beside their shards.
        cache_gb: remote shards that are kept there, at most, in 10^9 bytes.
        on_mismatch: when a checkpoint was trained with other data, seed or batch: "refuse", or "restart_epoch" to begin its
            epoch anew with these.

    `trainer` is Lightning's while it trains on them (training/feed.py).
    """

    trainer: Any = None

    def __init__(
        self,
        train: Sources,
        val: Sources | None = None,
        fields: Mapping[str, Member] | None = None,
        size: int = 256,
        batch: int = 64,
        seed: int = 0,
        workers: int = 0,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        buckets: str | Mapping[str, Any] | Sequence[Sequence[int]] | None = None,
        weights: Sequence[float] | None = None,
        window: int = 16,
        lanes: int = 1,
        damaged: Damage = "refuse",
        max_bad_fraction: float = 0.01,
        cache: str | Path = CACHE,
        cache_gb: float = 100.0,
        on_mismatch: Literal["refuse", "restart_epoch"] = "refuse",
        tokens: Count | None = None,
    ) -> None:
        self.tokens = tokens
        self.fields, self.mixed = apart(FIELDS if fields is None else fields)
        self.train, self.val, self.size, self.batch, self.seed, self.workers = train, val, size, batch, seed, workers
        self.crop, self.flip, self.filters, self.weights = crop, flip, dict(filters or {}), weights
        self.window, self.lanes, self.damaged, self.cache, self.on_mismatch = window, lanes, damaged, cache, on_mismatch
        self.sizes = sizes_of(buckets, size)
        words = {"flip": flip, "crop": crop, "damaged": damaged, "on_mismatch": on_mismatch, "size": size, "batch": batch}
        check_settings(train, val, self.fields, weights, self.sizes, **words)
        self.fetch, self.report = Fetch(cache, cache_gb), Report(self.sizes)
        self.bad = BadSamples(max_bad_fraction)
        self.progress = Progress(batch)
        self._buckets: dict[Split, list[Selection]] = {}

    @cached_property
    def train_set(self) -> Samples:
        """The training samples; indexes the shards at first."""
        return self._mixing(self._opened("train", self.train))

    @cached_property
    def val_set(self) -> Samples | None:
        """The validation samples, None without data.val."""
        return None if self.val is None else self._mixing(self._opened("val", self.val))

    @cached_property
    def steps(self) -> Steps:
        """The order of training."""
        index, parts = self.train_set.index, self._buckets["train"]
        if self.weights is None:
            streams = [Stream(part, self.seed, self.window, self.lanes, number) for number, part in enumerate(parts)]
            return Steps(streams, self.sizes, [len(part) for part in parts], self.batch, self.seed)
        of = owners(self.train, index.shards)
        sets = [parts[0].within(of == i) for i in range(len(self.train))]
        if empty := [str(one) for one, samples in zip(self.train, sets) if not len(samples)]:
            raise Refusal(f"data.weights: there is nothing to train on in {', '.join(empty)}; look at data.filters.")
        streams = [Stream(one, self.seed, self.window, number=i) for i, one in enumerate(sets)]
        mixture = Mixture(streams, self.weights, self.batch, self.seed)
        return Steps([mixture], self.sizes, [len(parts[0])], self.batch, self.seed)

    def prepare_data(self) -> None:
        """Indexes all shards, once on each node."""
        _ = self.train_set, self.val_set

    def setup(self, stage: str | None = None) -> None:
        """Checks that every sample has what `fields` names, and that latents are those of the trained model's autoencoder."""
        _ = self.train_set, self.val_set
        check_provenance(self, None if self.trainer is None else self.trainer.lightning_module)

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless micro-batches of this device, from sample `consumed` on.

        Raises:
            Refusal: a checkpoint that was trained with another kind of data, and `on_mismatch` is "refuse".
        """
        if self.progress.unsaid(self.trainer):
            if self.on_mismatch == "refuse":
                raise Refusal(
                    f"The checkpoint of step {self.trainer.global_step} was trained with another kind of data than "
                    f"{type(self).__name__}, and its order of samples is not this one's. Take that data=..., begin another run "
                    "(run_id=..., resume=never), or an epoch of this data: data.on_mismatch=restart_epoch."
                )
            step = self.trainer.global_step
            self.progress.begin(self.steps.first_step(self.steps.epoch_of(step)), step)
        self.progress.begun = True
        rank, world, accumulate = self.share()
        order = Batches(self.steps, rank, world, accumulate, self.progress.first)
        others = dict(zip(self.sizes, self._buckets["train"]))
        return ahead(self._load(Loaded(self.train_set, others, self.crop, self.flip, self.seed), order), self.trainer)

    def val_dataloader(self) -> DataLoader | list:
        """Every validation sample once over all devices, bucket by bucket. Empty without data.val."""
        rank, world, accumulate = self.share()
        return [] if self.val_set is None else self.bucketed("val", self.batch // accumulate, rank, world)

    def ordered(self, split: Split, batch: int, rank: int = 0, world: int = 1) -> DataLoader:
        """Every sample of a split once, in order and square, `batch` at a time over all `world` processes; position = index.

        What cannot be read is left out, and counted as in training.
        """
        samples = self._split(split)
        return self._load(Loaded(samples), Once([samples.selection], [(self.size, self.size)], batch, rank, world))

    def bucketed(self, split: Split, batch: int, rank: int = 0, world: int = 1) -> DataLoader:
        """As `ordered`, but bucket by bucket, each in its size; position counts up."""
        samples = self._split(split)
        return self._load(Loaded(samples), Once(self._buckets[split], self.sizes, batch, rank, world))

    def share(self) -> tuple[int, int, int]:
        """-> rank, number of ranks, micro-batches of a step; 0, 1 and 1 without a trainer."""
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def parts(self, split: Split) -> tuple[list[Selection], list[Size]]:
        """-> the samples of each bucket, and its height and width in pixels."""
        self._split(split)
        return self._buckets[split], self.sizes

    def rows(self, split: Split, chosen: Sequence[int]) -> Batch:
        """The chosen samples of a split as one batch, square; position = index."""
        samples = self._split(split)
        places = [Place(i, *samples.selection.locate(i), self.size, self.size) for i in chosen]
        batch = Loaded(samples).__getitems__(places)
        if "bad" in batch:
            raise Refusal(f"{batch['bad'][0]}; choose others, or mend the shards (python -m ldm doctor).")
        return batch

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Where the checkpoint lay between two micro-batches, whose gradients are lost, its step begins anew with all of them.

        An epoch of buckets begins with a report of their use.
        """
        if self.trainer is None or not self.trainer.training:
            return batch
        if self.progress.resumed:
            self.progress.resumed = False
            begin_step_anew(self.trainer)
        if len(self.sizes) > 1:
            self.report(self.steps, int(batch["position"][0]) // self.batch, self.trainer)
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: str | torch.device, dataloader_idx: int = 0) -> Batch:
        """The same with its tensors on the device."""
        how = {"device": device, "non_blocking": torch.device(device).type == "cuda"}
        return {field: value.to(**how) if isinstance(value, Tensor) else value for field, value in batch.items()}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Pictures uint8 (B, 3, H, W) -> float32 in [-1, 1], channels last; other floats -> float32; all else stays.

        Raises:
            Refusal: too many samples could not be read.
        """
        self.bad.note(batch, self.trainer)
        batch = {field: value for field, value in batch.items() if field != "bad"}
        for field, member in self.fields.items():
            value = batch.get(field)
            if value is not None and is_image(member):
                batch[field] = to_float(value)
            elif isinstance(value, Tensor) and value.dtype.is_floating_point:
                batch[field] = value.float()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, the same on every rank, in plain Python."""
        step = self.trainer.global_step if self.trainer else 0
        consumed = self.progress.at(step)
        return {
            "consumed": consumed,
            "epoch": self.steps.epoch_of(consumed // self.batch),
            "step": step,
            "seed": self.seed,
            "batch": self.batch,
            "data": self.content,
        }

    @cached_property
    def content(self) -> str:
        """sha256, in hex, over the data and their order: where one differs, so do the samples that training sees."""
        first = [[p.position, p.shard, p.row] for p in self.steps(0)[:256]]  # a NumPy that permutes otherwise shows here
        rules = [self.filters, self.fields, self.sizes, self.weights, self.window, self.lanes, self.crop, self.flip, first]
        rules += [self.mixed] if self.mixed else []
        chosen = [part.content() for part in self._buckets["train"]]  # numbers beside the shards may decide
        return digest_of([self.train_set.index.fingerprint(), *chosen, json.dumps(rules, default=list, sort_keys=True)])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint stopped.

        Raises:
            Refusal: it was trained with another seed, batch or data set, and `on_mismatch` is "refuse".
        """
        mine = {"seed": self.seed, "batch": self.batch, "data": self.content}
        if "data" not in state_dict:  # of a version that knew data by their names and sizes
            warn("The checkpoint does not say what its data held, so that this run's were not compared with them.")
        there = {name: state_dict.get(name, own) for name, own in mine.items()}
        changes = ", ".join(f"{n} {there[n]!s:.12} there, {own!s:.12} here" for n, own in mine.items() if there[n] != own)
        first = state_dict["consumed"] // self.batch
        if changes:
            if self.on_mismatch == "refuse":
                raise Refusal(
                    f"The checkpoint's samples are not this run's, or come in another order: {changes}. Give the run what the "
                    "checkpoint had (data.seed, data.batch, data.train with the same pictures and captions, data.filters and so "
                    "on), or begin its epoch anew with these: data.on_mismatch=restart_epoch."
                )
            first = self.steps.first_step(state_dict["epoch"])
            warn(f"Samples are not the checkpoint's: {changes}. Beginning epoch {state_dict['epoch']} anew.")
        self.progress.begin(first, state_dict["step"])

    def _opened(self, split: Split, source: Sources) -> Samples:
        index = Index(expand(source, f"data.{split}"), self.fetch, self.damaged, self.cache)
        for line in passed_over(source):
            warn(f"data.{split}={line}")
        if index.damage:
            warn(f"{len(index.damage)} damaged shards are left out: {index.damage}")
        pictures = any(is_image(member) for member in self.fields.values())
        least = self.batch if split == "train" and pictures else 1  # latents have the size that they have
        selection, self._buckets[split] = select(index, self.fields, self.filters, self.sizes, least, self.tokens)
        return Samples(index, selection, self.fields, self.size)

    def _mixing(self, samples: Samples) -> Samples:
        samples.mixed = self.mixed
        return samples

    def _split(self, split: Split) -> Samples:
        samples = {"train": self.train_set, "val": self.val_set}[split]
        if samples is None:
            raise Refusal(
                "There are no validation samples; set data.val (data=torch: data.val_dataset, data=hf: data.val_split)."
            )
        return samples

    def _load(self, loaded: Loaded, order: Batches | Once) -> DataLoader:
        again = isinstance(order, Once)  # the other one has no end
        return DataLoader(loaded, batch_sampler=order, collate_fn=as_is, **loading(self.workers, again))
