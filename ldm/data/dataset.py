"""Any map-style dataset of torch, torchvision or a package of the user's own, in our order: exact, and resumed exactly.

A sample is a tuple or a mapping; `fields` say which place or key of it becomes which field of the batch. Its values become
  PIL's picture, uint8 array (H, W), (H, W, 3) or tensor (3, H, W)   picture    uint8 (3, height, width), cut to size
  number that is whole                                               class      int64
  text, or a list of texts, of which the position chooses one        text       str
  mapping                                                            record     dict
  other array or tensor                                              array      of its own type
Random transforms of its own draw from torch's, NumPy's and Python's generators, which are seeded by (seed, position) while a
sample is made: they are functions of the position too, whatever the number of workers or ranks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.batch.listed import Listing
from ldm.data.batch.samples import Samples
from ldm.data.shard.decode import View, cut_picture, is_image
from ldm.data.shard.selection import Selection
from ldm.data.shards import Shards, Split
from ldm.errors import Refusal
from ldm.files.cache import cache_folder
from ldm.files.content import digest_of
from ldm.types import mix

LOOKED_AT = 32  # samples, evenly chosen, that tell data sets apart
SAMPLE = 2**32 + 5  # a stream of random numbers


@runtime_checkable
class Mapped(Protocol):
    """What torch calls a map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


class MapStyle(Shards):
    """A map-style dataset as batches.

    Args:
        dataset, val_dataset: a dataset, or what makes one: called where data are prepared, at first by one process a node.
        fields: batch field -> place in a sample, a number or a key.
        size, batch, seed, workers, crop, flip, on_mismatch: as in Shards.
    """

    def __init__(
        self,
        dataset: Mapped | Callable[[], Mapped],
        val_dataset: Mapped | Callable[[], Mapped] | None = None,
        fields: Mapping[str, int | str | None] | None = None,
        size: int = 32,
        batch: int = 64,
        seed: int = 0,
        workers: int = 0,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        on_mismatch: Literal["refuse", "restart_epoch"] = "refuse",
    ) -> None:
        named = {"image": 0, "label": 1} if fields is None else fields
        self.places = {field: place for field, place in named.items() if place is not None}
        stand_in = dict.fromkeys(self.places, "jpg")  # what they are is known once there is a sample
        super().__init__([], None, stand_in, size, batch, seed, workers, crop=crop, flip=flip, on_mismatch=on_mismatch)
        self.datasets, self._learnt = {"train": dataset, "val": val_dataset}, False

    @cached_property
    def train_set(self) -> Samples:
        """The training samples."""
        return self._opened("train", self.datasets["train"])

    @cached_property
    def val_set(self) -> Samples | None:
        """The validation samples, None without data.val_dataset."""
        return None if self.datasets["val"] is None else self._opened("val", self.datasets["val"])

    def _opened(self, split: Split, source: Any) -> Samples:
        dataset = source() if callable(source) and not isinstance(source, Mapped) else source
        option = "data.dataset" if split == "train" else "data.val_dataset"
        if not isinstance(dataset, Mapped) or not len(dataset):
            raise Refusal(
                f"{option}={type(dataset).__name__}: a map-style dataset is wanted, with samples, by number, and a length."
            )
        with seeded(self.seed, 0):
            self.learn(dataset[0], option)
        listing = _listing(dataset, self.fields, self.seed)
        selection = Selection(listing.counts)
        self._buckets[split] = [selection]
        places = {self.fields[field]: place for field, place in self.places.items()}
        return Made(listing, selection, self.fields, self.size, dataset, places, self.seed)

    def learn(self, sample: Any, option: str) -> None:
        """Takes from a data set's first sample what its fields are.

        Raises:
            Refusal: they are nothing that a batch can hold, or not what those of the other split are.
        """
        values = {field: place_of(sample, place, option) for field, place in self.places.items()}
        kinds = {field: f"{field}.{kind_of(value, option, field)}" for field, value in values.items()}
        if self._learnt and kinds != self.fields:
            raise Refusal(f"{option} has other kinds of values than the other split: {kinds}, {self.fields}.")
        self.fields, self._learnt = kinds, True


class Made(Samples):
    """Samples that a dataset makes when it is asked.

    Args:
        listing: what is known of the samples.
        selection: which of them count.
        fields: batch field -> member.
        size: pixels.
        dataset: what makes them.
        places: member -> its place in a sample.
        seed: of what the dataset draws at random.
    """

    def __init__(
        self,
        listing: Listing,
        selection: Selection,
        fields: Mapping[str, str],
        size: int,
        dataset: Mapped,
        places: Mapping[str, int | str],
        seed: int,
    ) -> None:
        super().__init__(listing, selection, fields, size)
        self.dataset, self.places, self.seed, self.position = dataset, dict(places), seed, 0
        self._made: tuple[tuple[int, int], Any] | None = None

    def at(self, position: int) -> None:
        """The next samples are made for this position."""
        self.position = position

    def read(self, shard: int, row: int, member: str, view: View, out: np.ndarray | None = None) -> Any:
        """One value of a sample; an error of the dataset's own keeps its traceback.

        Args:
            shard: 0, the one part.
            row: the sample's number.
            member: which of its values.
            view: what of a picture is looked at.
            out: is not used.
        """
        key = (self.position, row)
        if self._made is None or self._made[0] != key:
            with seeded(self.seed, self.position):
                self._made = key, self.dataset[row]
        value = place_of(self._made[1], self.places[member], "data.dataset")
        return value_of(value, member, view, mix(self.seed, SAMPLE, self.position))

    def copy_array(self, shard: int, row: int, member: str, header: bytes, out: memoryview) -> bool:
        """Copies nothing: arrays are no files.

        Args:
            shard, row, member, header, out: as in Samples, and not used.
        """
        return False


@contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random numbers by (seed, position), and afterwards as they were."""
    number = mix(seed, SAMPLE, position)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def kind_of(value: Any, option: str, field: str) -> str:
    """What a value is, by the ending of a member of shards: jpg, txt, cls, json or npy.

    Raises:
        Refusal: nothing that a batch can hold, or a picture whose range is not known.
    """
    if isinstance(value, Image.Image) or _is_pixels(value):
        return "jpg"
    if isinstance(value, str) or (isinstance(value, Sequence) and value and all(isinstance(v, str) for v in value)):
        return "txt"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return "cls"
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 and "int" in str(value.dtype):
        return "cls"
    if isinstance(value, Mapping):
        return "json"
    if isinstance(value, Tensor | np.ndarray) and value.dtype != object:
        if torch.as_tensor(value).is_floating_point() and value.ndim == 3 and value.shape[0] in (1, 3):
            raise Refusal(
                f"{option}: `{field}` is an array of floats, {tuple(value.shape)}, whose range is not known here. Leave ToTensor "
                "and Normalize out: PIL's pictures, or uint8, are brought to size and to [-1, 1] here."
            )
        return "npy"
    kinds = "a picture, a whole number, text, a mapping or an array"
    raise Refusal(f"{option}: `{field}` is of type {type(value).__name__}; wanted {kinds}.")


def value_of(value: Any, member: str, view: View, number: int) -> Any:
    """A value of a sample as a batch has it. number: what chooses among several texts.

    Raises:
        Refusal: it is of another kind than the first sample's.
    """
    field, _, kind = member.rpartition(".")
    if (actual := kind_of(value, "data.dataset", field)) != kind:
        raise Refusal(f"data.dataset: `{field}` is of kind {actual} in one sample and {kind} in the first.")
    if is_image(member):
        return cut_picture(value if isinstance(value, Image.Image) else _picture(value), view)
    if kind == "txt":
        return (value if isinstance(value, str) else value[number % len(value)]).strip()
    if kind == "cls":
        return int(value)
    return dict(value) if kind == "json" else torch.as_tensor(np.ascontiguousarray(value))


def _is_pixels(value: Any) -> bool:
    if not isinstance(value, Tensor | np.ndarray) or str(value.dtype).removeprefix("torch.") != "uint8":
        return False
    channels = value.shape[0] if isinstance(value, Tensor) else value.shape[-1]
    return value.ndim == 2 or (value.ndim == 3 and channels in (1, 3))


def _picture(value: Tensor | np.ndarray) -> Image.Image:
    pixels = value.permute(1, 2, 0).numpy() if isinstance(value, Tensor) and value.ndim == 3 else np.asarray(value)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def place_of(sample: Any, place: int | str, option: str) -> Any:
    """A value of a sample.

    Raises:
        Refusal: there is none in that place.
    """
    try:
        return sample[place]
    except (LookupError, TypeError) as error:
        has = f"the keys {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
        length = f" of {len(sample)}" if isinstance(sample, tuple | list) else ""
        raise Refusal(f"{option}: a sample has no {place!r}, but {has}{length}; set data.fields.") from error


def _listing(dataset: Mapped, members: Mapping[str, str], seed: int) -> Listing:
    count = len(dataset)
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(count, LOOKED_AT))})
    words = [f"{type(dataset).__module__}.{type(dataset).__qualname__}", str(count)]
    for i in chosen:
        with seeded(seed, i):
            words.append(_digest(dataset[i]))
    there = dict.fromkeys(members.values(), np.ones(count, dtype=bool))
    content = digest_of(words)
    return Listing(words[0], [str(i) for i in range(count)], there, {}, content, cache_folder() / "datasets" / content[:16])


def _digest(value: Any) -> str:
    """sha256, in hex, over a sample's values, whatever they are."""
    if isinstance(value, Mapping):
        return digest_of([f"{name} {_digest(v)}" for name, v in value.items()])
    if isinstance(value, tuple | list):
        return digest_of(list(map(_digest, value)))
    if isinstance(value, Image.Image):
        return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value)
        return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
    return digest_of([repr(value)])
