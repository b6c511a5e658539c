"""The sources of the pictures that metrics see: drawn, reconstructed, or real. All are rounded to 8 bits, as in a file."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.drawing.generate import check_paste, generate
from ldm.drawing.precision import PRECISIONS, in_precision
from ldm.errors import Refusal
from ldm.evaluation.rows import Source, fingerprint
from ldm.files.picture import from_bytes, open_picture, to_bytes, to_tensor
from ldm.files.whole import write_whole
from ldm.model import LatentModel
from ldm.types import Autoencoder, Batch, Cond, Conditioned, DataModule, Denoise, Guidance, Sampler


def on_grid(images: Tensor) -> Tensor:
    """(B, 3, h, w) in [-1, 1] -> the same, rounded to 8 bits."""
    return from_bytes(to_bytes(images))


def chosen(data: DataModule, count: int, split: str = "train") -> list[int]:
    """-> the numbers of `count` evenly spaced samples of a split, `train` or `val`.

    Raises:
        Refusal: the split has fewer.
    """
    total = len({"train": data.train_set, "val": data.val_set}[split] or ())
    if count > total:
        raise Refusal(f"count={count} pictures were asked for, but there are only {total} {split} samples; use count={total}.")
    return torch.linspace(0, total - 1, count).round().long().tolist()


class Split:
    """The real pictures of a data module's `split`, `train` or `val`: the samples `numbers`, or all of them with None.

    Raises:
        Refusal: the split is empty.
    """

    def __init__(self, data: DataModule, split: str, device: Any, numbers: Sequence[int] | None = None) -> None:
        samples = {"train": data.train_set, "val": data.val_set}[split]
        if not samples:
            raise Refusal(f"The {split} pictures are asked for, and data.{split} is empty; name shards with data.{split}=PATH.")
        self.data, self.split, self.device = data, split, device
        self.numbers = range(len(samples)) if numbers is None else list(numbers)
        self.count = len(self.numbers)
        self.protocol = {"shards": samples.index.fingerprint(), "split": split, "size": data.size, "fields": dict(data.fields)}
        self.protocol |= {"filters": dict(data.filters), "kept": samples.selection.content()} if data.filters else {}
        self.protocol |= {} if numbers is None else {"chosen": fingerprint(self.numbers)}

    def fields(self, numbers: Sequence[int]) -> Batch:
        """B numbers -> the samples' fields, on the device, and the name of their `split`."""
        batch = self.data.rows(self.split, [self.numbers[n] for n in numbers])
        batch = self.data.on_after_batch_transfer(self.data.transfer_batch_to_device(batch, self.device, 0), 0)
        return {**batch, "split": self.split}

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """-> the real pictures, (B, 3, h, w) in [-1, 1].

        Raises:
            Refusal: the fields have none.
        """
        if not isinstance(fields.get("image"), Tensor):
            raise Refusal(
                f"Real pictures are asked for, and data.fields has none as `image`: {dict(self.data.fields)}. Name pictures: "
                "data.fields.image=jpg, or, for a model of latents, data=shards data.train=PATH data.val=PATH data.size=..."
            )
        return fields["image"]


class Given:
    """`count` requests that a person wrote; their fields are lists or tensors of `count`."""

    def __init__(self, ask: Mapping[str, Any], count: int) -> None:
        self.ask, self.count = ask, count
        self.protocol = {"asked": {k: _plain(v) if isinstance(v, Tensor) else v for k, v in ask.items()}, "count": count}

    def fields(self, numbers: Sequence[int]) -> Batch:
        """B numbers -> the fields of these requests."""
        numbers = list(numbers)
        return {k: v[numbers] if isinstance(v, Tensor) else [v[n] for n in numbers] for k, v in self.ask.items()}


def _plain(value: Tensor) -> Any:
    """-> a tensor of few numbers as a list; maps and pictures as their hash."""
    return value.tolist() if value.ndim < 2 else hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest()


class Reconstructions:
    """Pictures that went through the autoencoder: decode(mean of encode(original)). `weights` is the autoencoder's hash."""

    def __init__(self, autoencoder: Autoencoder, originals: Split, weights: str) -> None:
        self.autoencoder, self.originals, self.count = autoencoder, originals, originals.count
        self.fields = originals.fields
        self.protocol = {"pictures": "reconstruction", "model": weights, "of": originals.protocol}

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """-> the reconstructions, (B, 3, h, w) in [-1, 1]."""
        moments = self.autoencoder.encode(self.originals.images(numbers, fields))
        return on_grid(self.autoencoder.decode(moments.mean).clamp(-1, 1))


class Drawings:
    """Pictures that a model draws; number n is drawn from seed + n.

    Args:
        model: what draws.
        requests: a source of requests, `Given` or `Split`.
        sampler: from noise to latents.
        guidance: from the model and a request to an estimate.
        seed: of picture 0.
        size: height and width in pixels.
        conditioning: `right` draws each picture from its request, `shuffled` from another picture's, `none` from the null
            condition; metrics compare it with its own request in each case, so that the difference is what conditions are worth.
        conditions: which of the model's conditions are shuffled or null, all by default; the others stay right. Of a ControlNet,
            null is strength 0.
        precision: 32, bf16 or 16, of the network.
        paste: what is done about an inpainting model's known part (drawing/generate.py).
        protocol: what else the pictures depend on, as plain values.

    Raises:
        Refusal: a value that is none of these, or too few requests to shuffle.
    """

    def __init__(
        self,
        model: LatentModel,
        requests: Any,
        sampler: Sampler,
        guidance: Guidance,
        seed: int,
        size: tuple[int, int],
        conditioning: str = "right",
        precision: str = "32",
        paste: str | None = "latents",
        protocol: Mapping[str, Any] | None = None,
        conditions: Sequence[str] | None = None,
    ) -> None:
        if conditioning not in ("right", "shuffled", "none"):
            raise Refusal(f"conditioning={conditioning}: wanted right, shuffled or none.")
        if precision not in PRECISIONS:
            raise Refusal(f"precision={precision}: wanted one of {', '.join(PRECISIONS)}.")
        self.model, self.requests, self.sampler, self.guidance = model, requests, sampler, guidance
        self.seed, self.size, self.conditioning, self.precision = seed, size, conditioning, precision
        self.paste, self.count = paste, requests.count
        self.conditions = self._conditions(conditions)
        check_paste(model, paste)
        if conditioning == "shuffled" and self.count < 2:
            raise Refusal("conditioning=shuffled needs at least 2 requests to shuffle (count=...).")
        self.protocol = {
            "pictures": "drawing",
            "requests": requests.protocol,
            "seed": seed,
            "size": list(size),
            "conditioning": conditioning,
            **({} if conditions is None or conditioning == "right" else {"conditions": sorted(self.conditions)}),
            "precision": "32" if precision == "32" else f"{precision}, the network alone",
            **({"paste": paste} if model.conditioner.hole else {}),
            **(protocol or {}),
        }

    def fields(self, numbers: Sequence[int]) -> Batch:
        """B numbers -> the requests' fields, and those that the model's conditions derive from them, such as masks."""
        return self.model.conditioner.fill(self.requests.fields(numbers))

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """fields: the requests' -> the drawings, (B, 3, height, width) in [-1, 1]."""
        device = next(self.model.denoiser.parameters()).device
        guidance = unconditional(self.guidance, self.conditions) if self.conditioning == "none" else self.guidance
        embedders, of = self.model.conditioner.embedders, self.model.conditioner.fields_of
        if self.conditioning == "none":
            strengths = [f"{name}_strength" for name in self.conditions if f"{name}_strength" in of(embedders[name])]
            fields = {**fields, **{name: torch.zeros(len(numbers)) for name in strengths}}
        if self.conditioning == "shuffled":
            others = self.fields([another(n, self.count, self.seed) for n in numbers])
            shuffled = {field for name in self.conditions for field in of(embedders[name])}
            fields = {name: others[name] if name in shuffled else value for name, value in fields.items()}
        guidance, seeds = in_precision(guidance, self.precision, device), [self.seed + n for n in numbers]
        return on_grid(generate(self.model, fields, self.sampler, guidance, seeds, self.size, self.paste))

    def _conditions(self, named: Sequence[str] | None) -> list[str]:
        """Those that are shuffled or none.

        Raises:
            Refusal: none is, there is no such condition, or one is never dropped.
        """
        embedders = self.model.conditioner.embedders
        if named is None:
            return list(embedders)
        if not named or set(named) - set(embedders):
            raise Refusal(f"conditions={list(named)}: wanted some of this model's, {', '.join(embedders) or 'which has none'}.")
        of = self.model.conditioner.fields_of
        fixed = [n for n in named if embedders[n].rate == 0 and f"{n}_strength" not in of(embedders[n])]
        if self.conditioning == "none" and fixed:
            raise Refusal(f"conditions={fixed} conditioning=none: it was never dropped in training; conditioning=shuffled does.")
        return list(named)


def unconditional(guidance: Guidance, conditions: Sequence[str]) -> Guidance:
    """-> the same guidance of a model in which these conditions are null in every place."""

    class Unconditional:
        def __init__(self, model: Conditioned) -> None:
            self.model, self.denoiser, self.conditioner = model, model.denoiser, model.conditioner

        def condition(self, request: Batch, only: Sequence[str] | None = None) -> Cond:
            embedders = self.conditioner.embedders
            silent = {f"negative.{field}" for name in conditions for field in self.conditioner.fields_of(embedders[name])}
            active = tuple(name for name in (embedders if only is None else only) if name not in conditions)
            return self.model.condition({field: v for field, v in request.items() if field not in silent}, only=active)

    def guide(model: Conditioned, ask: Batch) -> Denoise:
        return guidance(Unconditional(model), ask)

    return guide


def another(number: int, count: int, seed: int) -> int:
    """-> the number of the request that picture `number` of `count` is drawn from when they are shuffled: the next one in a cycle
    through all of them in random order, so that no picture has its own.
    """
    return int(_cycle(count, seed)[number])


@lru_cache(maxsize=2)
def _cycle(count: int, seed: int) -> np.ndarray:
    order = np.random.Generator(np.random.Philox(key=[seed % 2**64, count])).permutation(count)
    following = np.empty(count, dtype=np.int64)
    following[order] = np.roll(order, -1)
    return following


class Kept:
    """A source whose first `keep` pictures are written as FOLDER/000000.png ..., and read from there once they are."""

    def __init__(self, source: Source, folder: Path, keep: int) -> None:
        self.source, self.folder, self.keep = source, folder, min(keep, source.count)
        self.count, self.protocol, self.fields = source.count, source.protocol, source.fields

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """-> the pictures, (B, 3, h, w) in [-1, 1], from the files if all are there."""
        files = [self._file(n) for n in numbers]
        if all(file.is_file() for file in files):
            return read_pictures(files)
        images = self.source.images(numbers, fields)
        for file, n, image in zip(files, numbers, to_bytes(images).cpu()):
            if n < self.keep and not file.is_file():
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                write_whole(file, lambda path, picture=picture: picture.save(path, format="png"))
        return images

    def pictures(self) -> Tensor:
        """-> all that were written, (N, 3, h, w) in [-1, 1]."""
        return read_pictures([self._file(n) for n in range(self.keep)])

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"


def read_pictures(files: Sequence[Path]) -> Tensor:
    """PNG files of one size -> (N, 3, h, w) in [-1, 1]."""
    pixels = [to_tensor(open_picture(file.read_bytes(), ("PNG",)).convert("RGB")) for file in files]
    return from_bytes(torch.stack(pixels)) if pixels else torch.empty(0, 3, 0, 0)
