"""Latents ahead of time: shards of moments, and of captions' embeddings, encoded once, with a record of what made them.

The record, `provenance.json` beside the shards, holds the sha256 of the autoencoder's and the text tower's weights, the
fingerprint of the pictures' shards, their sizes, crop and precision. Training on these shards with another autoencoder, another
text tower or other sizes is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.batch.keep import kept_of, members_of
from ldm.data.batch.samples import CROP, SIZES, Loaded, Samples
from ldm.data.order.order import Place
from ldm.data.shard.decode import BadSample, View, is_array, is_image, is_text
from ldm.data.shard.source import expand
from ldm.data.shard.write import write_shard
from ldm.errors import TOO_LARGE, Refusal
from ldm.files.folder import read_json, write_json
from ldm.files.process import warn
from ldm.files.weights import weights_hash
from ldm.files.whole import remove_halves
from ldm.types import Autoencoder, DataModule, Draws, Embedder, StandIn

RECORD = "provenance.json"
REST = ("txt", "cls", "json")  # members that go along, where a sample has them

# B captions -> the arrays that are kept of each, by member
Embed = Callable[[Sequence[str]], Sequence[Mapping[str, Tensor]]]


@torch.no_grad()
def write_latents(
    autoencoder: nn.Module,
    data: DataModule,
    split: str,
    folder: Path,
    batch: int,
    device: Any,
    per_shard: int = 1000,
    half: bool = False,
    rank: int = 0,
    world: int = 1,
    text: tuple[Embedder, Embed] | None = None,
    keep: Sequence[str] = (),
) -> None:
    """Encodes a split of a data module into shards; goes on where it stopped.

    A sample is moments.npy (2C, H, W), the whitened mean above the standard deviation, and what `text` says of its caption, of a
    masked text only the spoken tokens; its caption and label, and the fields `keep` (keep.py); its record, with the sizes that
    SDXL is told. With data.buckets each is encoded in its bucket's size.

    Args:
        autoencoder: what encodes.
        data, split: the samples, `train` or `val`.
        folder: where the shards lie; a file that is there whole is not written again.
        batch: samples that are encoded at a time.
        device: where.
        per_shard: samples of a shard, at most.
        half: float16 in the place of float32.
        rank, world: this process, and how many there are: it writes shard rank, rank + world, ...
        text: a text and how it embeds captions; None keeps no embeddings.
        keep: further fields of the data that go along.

    Raises:
        Refusal: the folder holds latents of something else.
    """
    samples = {"train": data.train_set, "val": data.val_set}[split]
    members = members_of(data.fields, samples.mixed, keep)
    if text and samples.mixed:
        raise Refusal(
            f"data.fields mixes {', '.join(samples.mixed)}, drawn anew each time a sample comes, and embeddings are of one "
            "caption: leave condition=[...] out, and keep the texts (keep=[caption])."
        )
    record = {**about(autoencoder, half, text and text[0]), **shape_of(data), "pictures": samples.index.fingerprint()}
    _claim(folder, record | {"count": len(samples), "filters": data.filters, "per_shard": per_shard, "keep": members or None})
    numbers = range(rank, math.ceil(len(samples) / per_shard), world)
    for number in tqdm(numbers, desc=f"{split} latents", unit="shard", disable=rank > 0):
        path = folder / f"{number:05d}.tar"
        if not path.is_file():
            remove_halves(folder, path.name)
            rows = range(number * per_shard, min((number + 1) * per_shard, len(samples)))
            places = _places(*data.parts(split), rows, batch)
            write_shard(_encoded(autoencoder, data, Loaded(samples), places, device, half, text, members), path)


def about(autoencoder: nn.Module, half: bool = False, text: Embedder | None = None) -> dict[str, Any]:
    """What made the latents: the weights, as hashes, the text's settings, and the precision."""
    return {"autoencoder": weights_hash(autoencoder), **_about_text(text), "precision": "float16" if half else "float32"}


def shape_of(data: DataModule) -> dict[str, Any]:
    """How a data module brings pictures to size."""
    return {"size": data.size, "buckets": [list(size) for size in data.sizes], "crop": "center"}


def check_provenance(data: DataModule, stage: Any) -> None:
    """Compares the latents that a stage is to be trained and validated on with its model, also with what this reads only when
    it draws, and those of several folders with each other.

    Raises:
        Refusal: another autoencoder or text tower made them, they are of another size or precision, or are not all there.
    """
    model, members = stage.latent_model() if isinstance(stage, Draws) else None, data.fields.values()
    pictures = "moments" not in data.fields and any(is_image(member) for member in members)
    if model is None or pictures or not any(is_array(member) for member in members):
        return
    autoencoder = model.autoencoder.original() if isinstance(model.autoencoder, StandIn) else model.autoencoder
    here = {**shape_of(data), "autoencoder": weights_hash(autoencoder) if list(autoencoder.parameters()) else None}
    for embedder in model.conditioner.embedders.values():
        text = embedder.original() if f"{embedder.key}_tokens" in data.fields else None
        here |= {} if text is None else _about_text(text)
    for source in filter(None, (data.train, data.val)):
        known = [("this run", here)]
        for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in expand(source)):
            there = _record_of(folder)
            if there is None:
                warn(f"{folder} has no {RECORD}: what made the latents in it is not known, and was not compared.")
                continue
            for other, those in known:
                _compare(folder, there, other, those)
            known.append((folder, {name: there.get(name) for name in ("autoencoder", "precision")}))
            _check_whole(Path(folder), there)


def _about_text(text: Embedder | None) -> dict[str, Any]:
    return {"text": text and weights_hash(text), "text_settings": text and text.settings()}


def _record_of(folder: str) -> dict[str, Any] | None:
    """What made the latents in a folder, or below an address; None where that is not said."""
    system, path = fsspec.core.url_to_fs(folder or ".")
    file = f"{path}/{RECORD}"
    return json.loads(system.cat_file(file)) if system.isfile(file) else None


def _compare(folder: str, there: Mapping[str, Any], other: str, here: Mapping[str, Any]) -> None:
    lines = {"autoencoder": "autoencoder.path=FOLDER", "text": "condition.cached_text.load.model=..."}
    lines["text_settings"] = "condition.cached_text.load.layers=... and so on"
    lines |= dict.fromkeys(("crop", "precision"), "data.train=...")
    for what, value in here.items():
        if value is not None and there.get(what, value) != value:
            raise Refusal(
                f"The latents in {folder} were made with another {what} ({_short(there[what])}) than {other}'s "
                f"({_short(value)}). Name what made them ({lines.get(what, f'data.{what}=...')}), or make them again with "
                "`python precompute.py model=AUTOENCODER out=...`."
            )


def _check_whole(folder: Path, there: Mapping[str, Any]) -> None:
    found, wanted = len(list(folder.glob("*.tar"))), math.ceil(there.get("count", 0) / there.get("per_shard", 1))
    if folder.is_dir() and found < wanted:
        raise Refusal(
            f"{folder} holds {found} of the {wanted} shards of latents that precompute.py was to write: it was stopped. The same "
            "command goes on where it stopped."
        )


def _short(value: Any) -> str:
    return f"sha256 {value[:12]}" if isinstance(value, str) and len(value) == 64 else str(value)


def _claim(folder: Path, record: Mapping[str, Any]) -> None:
    """Says what the folder is for, or makes sure that it is for this."""
    file = folder / RECORD
    if not file.is_file():
        if any(folder.glob("*.tar")):
            raise Refusal(f"{folder} holds shards that are not ours; write to another folder (out=...).")
        write_json(record, file)
    before = read_json(file)
    if other := [f"{k} {before.get(k)} there, {v} here" for k, v in record.items() if before.get(k) != v]:
        raise Refusal(f"{folder} holds other latents: {'; '.join(other)}. Write to another folder (out=...), or remove it.")


def _places(selections: Sequence[Any], sizes: Sequence[tuple[int, int]], rows: range, batch: int) -> Iterator[list[Place]]:
    """The samples `rows`, counted bucket by bucket, at most `batch` of one size together."""
    base = 0
    for selection, size in zip(selections, sizes):
        stop = min(rows.stop, base + len(selection))
        for first in range(max(rows.start, base), stop, batch):
            numbers = np.arange(first, min(first + batch, stop))
            yield [Place(n, *at, *size) for n, at in zip(numbers.tolist(), selection.locate_all(numbers - base))]
        base += len(selection)


def _encoded(
    autoencoder: Autoencoder,
    data: DataModule,
    loaded: Loaded,
    places: Iterator[list[Place]],
    device: Any,
    half: bool,
    text: tuple[Embedder, Embed] | None,
    members: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    seen: Counter[str] = Counter()
    for chosen in places:
        at = {place.position: (place.shard, place.row) for place in chosen}
        fields = loaded.__getitems__(chosen)
        fields = data.on_after_batch_transfer(data.transfer_batch_to_device(fields, device, 0), 0)
        moments = autoencoder.encode(fields["image"])
        if not (moments.mean.isfinite().all() and moments.std.isfinite().all()):
            raise Refusal(f"The latents of {fields['key'][0]!r} and those beside it are not finite: {TOO_LARGE} (model=FOLDER).")
        rows = [{"moments.npy": x} for x in torch.cat((moments.mean, moments.std), dim=1).cpu()]
        said = [{} for _ in rows] if text is None else text[1](fields[text[0].key])
        for i, (key, position) in enumerate(zip(fields["key"], fields["position"].tolist())):
            kept = _rest(loaded.samples, *at[position], [member for member in members.values() if is_text(member)])
            kept |= kept_of(fields, members, i)
            kept["json"] = {**kept.get("json", {}), **_sizes(fields, i)}
            seen[key] += 1  # another folder's sample may have the same
            name = key if seen[key] == 1 else f"{key}-{seen[key]}"
            arrays = {m: x.half() if half and x.is_floating_point() else x for m, x in {**rows[i], **said[i]}.items()}
            yield {"__key__": name, **kept, **{member: x.cpu().numpy() for member, x in arrays.items()}}


def _rest(samples: Samples, shard: int, row: int, texts: Sequence[str]) -> dict[str, Any]:
    """Caption, class, record and further texts, those that there are and that can be read."""
    kept = {}
    for member in (*REST, *texts):
        if samples.index.table(shard).span(row, member)[0] >= 0:
            try:
                kept[member] = samples.read(shard, row, member, View(1, 1))
            except BadSample:
                continue
    return kept


def _sizes(fields: Mapping[str, Any], i: int) -> dict[str, int]:
    """What the index of the latents is to say of a picture: its size as it was encoded, once, and where it was cut."""
    told = {name: int(fields[name][i]) for name in SIZES}
    known = {name: told[name] for name in SIZES if name in CROP or (name.startswith("original") and told[name])}
    return known | {"width": told["target_width"], "height": told["target_height"]}
