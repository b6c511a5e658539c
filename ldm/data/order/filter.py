"""Which samples are trained on, told by what the index knows of them; what each rule drops is counted and said.

A rule names a number and the range it must lie in, ends included: `data.filters={side: [256, null], watermark: [null, 0.5]}`.
Numbers are the columns of the index (whatever img2dataset kept), in any case where but one fits, and: `side` and
`original_side`, the shorter one in pixels; `aspect`, the longer side by the shorter; `caption_length` in characters; `tokens`
of the caption, counted by `data.tokens`, so that none is cut; and, under the names that LAION's releases gave them, `aesthetic`,
`watermark`, `unsafe`, `similarity`. Three rules are words:
`unique: true` keeps the first of those with the same hash, `complete: true` drops samples that lack a member of data.fields,
`missing: drop` (or `keep`) says what becomes of a sample whose number is not known; otherwise such shards are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.order.bucket import Size, assign
from ldm.data.shard.decode import BadSample, View, decode, is_alike, is_text
from ldm.data.shard.index import Index, Table
from ldm.data.shard.selection import Selection
from ldm.errors import Refusal
from ldm.files.folder import read_json, write_json
from ldm.files.process import say
from ldm.files.whole import whole_folder

ALIASES = {
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics", "aesthetic_score_laion_v2", "score"),
    "watermark": ("pwatermark", "watermark", "watermark_prob"),
    "unsafe": ("punsafe", "unsafe", "nsfw_prob"),
    "similarity": ("similarity", "clip_similarity_vitb32", "clip_similarity", "clip_similarity_vitl14"),
}
WORDS = ("unique", "complete", "missing")
TOKENS = "tokens"

Count = Callable[[Sequence[str]], Sequence[int]]  # captions -> how many tokens each has; it says its `model`


def select(
    index: Index,
    fields: Mapping[str, str],
    rules: Mapping[str, Any],
    sizes: Sequence[Size],
    least: int = 1,
    count: Count | None = None,
) -> tuple[Selection, list[Selection]]:
    """What the rules keep of an index -> all of it, and its parts, one for each size.

    What was found is kept beside the index, since it takes a look at every sample.

    Args:
        index: of the samples.
        fields: batch field -> member, which each sample must have.
        rules: data.filters.
        sizes: of the buckets.
        least: samples that a bucket must have, or its pictures go into another one.
        count: counts the tokens of captions, where a rule asks for them.

    Raises:
        Refusal: a rule is none, a number is not known, or samples lack what `fields` names.
    """
    check_rules(rules)
    known = [index.state, sorted(fields.values()), dict(rules), list(map(list, sizes)), least]
    words = json.dumps([*known, count.model] if count is not None and TOKENS in rules else known)
    folder = index.folder / f"kept-{hashlib.sha256(words.encode()).hexdigest()[:16]}"
    if not (folder / "report.json").is_file():
        selected, dropped = apply(index, fields, rules, count)
        parts = assign(index, selected, sizes, least) if len(sizes) > 1 else []
        _save([selected, *parts], {"samples": len(index), "dropped": dropped}, folder)
    report = read_json(folder / "report.json")
    if report["dropped"]:
        say(table_of(report["samples"], report["dropped"]))
    whole, *parts = (_load(folder, i) for i in range(report["selections"]))
    return whole, parts or [whole]


def table_of(left: int, dropped: Mapping[str, int]) -> str:
    """What each rule dropped of `left` samples, as lines."""
    lines = [f"{'data.filters':32s} {'dropped':>12s} {'left':>12s}"]
    for rule, count in dropped.items():
        left -= count
        lines.append(f"{rule:32s} {count:12,d} {left:12,d}")
    return "\n".join(lines)


def numbers(table: Table, name: str) -> np.ndarray | None:
    """(rows) the numbers that a rule speaks of, NaN where one is not known; None where the shard has none.

    Raises:
        Refusal: the name fits several columns that differ in case alone.
    """
    if name in ("side", "original_side", "aspect"):
        first = "original_" if name == "original_side" else ""
        width, height = (table.column(f"{first}{side}") for side in ("width", "height"))
        low, high = np.minimum(width, height), np.maximum(width, height)
        return high / low if name == "aspect" else low
    for word in ALIASES.get(name, (name,)):
        spelt = [known for known in table.numbers if known.lower() == word.lower()]
        if len(spelt) > 1 and word not in spelt:
            raise Refusal(f"data.filters.{name}: the samples have the columns {', '.join(spelt)}; name one as it is spelt.")
        if spelt:
            return table.column(word if word in spelt else spelt[0])
    return None


def apply(
    index: Index, fields: Mapping[str, str], rules: Mapping[str, Any], count: Count | None = None
) -> tuple[Selection, dict[str, int]]:
    """Looks at every sample; -> those that the rules keep, and how many each rule dropped, one after the other.

    Raises:
        Refusal: a number is not known, or samples lack what `fields` names.
    """
    ranges = {name: rule for name, rule in rules.items() if name not in WORDS}
    dropped = {f"{name}: [{low}, {high}]": 0 for name, (low, high) in ranges.items()}
    dropped |= {f"{word}: true": 0 for word in ("complete", "unique") if rules.get(word)}
    selected, lacking, silent, hashes = [], [0, ""], [0, ""], []
    for s in range(len(index.shards)):
        table = index.table(s)
        keep = np.ones(int(index.counts[s]), dtype=bool)
        for name, (low, high) in ranges.items():
            values = numbers(table, name)
            if name == TOKENS and (values is None or count is not None):
                values = _tokens(index, s, fields, count)
            passes = _passes(table, values, name, low, high, rules.get("missing", "refuse"), index.shards[s])
            dropped[f"{name}: [{low}, {high}]"] += int((keep & ~passes).sum())
            keep &= passes
        whole = np.logical_and.reduce([table.has(member) for member in fields.values()])
        if rules.get("complete"):
            dropped["complete: true"] += int((keep & ~whole).sum())
            keep &= whole
        _note(lacking, keep & ~whole, table, index.shards[s])
        if any(is_text(member) for member in fields.values()):
            _note(silent, keep & (table.column("caption_length") == 0), table, index.shards[s])
        selected.append(keep.nonzero()[0])
        hashes.append(table.column("hash")[selected[-1]] if rules.get("unique") else None)
    _refuse(index, fields, lacking, silent)
    if rules.get("unique"):
        selected, dropped["unique: true"] = _first_of_each(selected, hashes, rules.get("missing", "refuse"))
    everything = sum(map(len, selected)) == len(index)
    return Selection(index.counts) if everything else Selection.of(selected), dropped


def _tokens(index: Index, shard: int, fields: Mapping[str, str], count: Count | None) -> np.ndarray:
    """(rows) the tokens of each caption of a shard, NaN where there is none that can be read."""
    member = next((member for member in fields.values() if is_text(member)), None)
    if count is None or member is None:
        lacking = "data.fields names no text" if member is None else "data.tokens, which counts them, is null"
        raise Refusal(
            f"data.filters.{TOKENS}: {lacking}. Name the model whose tokenizer counts, clip or as in condition.t5.model: "
            "data.tokens={_target_: ldm.tower.counter.Counter, model: google/t5-v1_1-xxl}."
        )
    table, texts = index.table(shard), {}
    with index.fetch.held(index.shards[shard]) as path, open(path, "rb") as file:
        for row in table.has(member).nonzero()[0].tolist():
            offset, size = table.span(row, member)
            try:
                texts[row] = decode(member, os.pread(file.fileno(), size, offset), View(1, 1))
            except BadSample:
                continue
    values = np.full(len(table), np.nan)
    values[list(texts)] = count(list(texts.values()))
    return values


def _passes(
    table: Table, values: np.ndarray | None, name: str, low: float | None, high: float | None, missing: str, shard: str
) -> np.ndarray:
    unknown = np.ones(len(table), dtype=bool) if values is None else np.isnan(values)
    if unknown.any() and missing == "refuse":
        raise Refusal(
            f"data.filters.{name}: {int(unknown.sum())} of {len(table)} samples in {shard} do not say it; they have "
            f"{', '.join(table.numbers)}. Name one of these, or say what becomes of such samples: "
            "+data.filters.missing=drop or keep."
        )
    if values is None:
        return np.full(len(table), missing == "keep")
    inside = (values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high))
    return np.where(unknown, missing == "keep", inside)


def _first_of_each(selected: list[np.ndarray], hashes: list[np.ndarray], missing: str) -> tuple[list[np.ndarray], int]:
    joined = np.concatenate(hashes)
    unknown = joined == 0
    if unknown.any() and missing == "refuse":
        raise Refusal(
            f"data.filters.unique: {int(unknown.sum())} of {len(joined)} samples have no hash (sha256, sha512 or md5 in their "
            "record). Say what becomes of such samples: +data.filters.missing=drop or keep."
        )
    first = np.zeros(len(joined), dtype=bool)
    first[np.unique(joined, return_index=True)[1]] = True
    keep = np.where(unknown, missing == "keep", first)
    parts = np.split(keep, np.cumsum([len(rows) for rows in selected])[:-1])
    return [rows[part] for rows, part in zip(selected, parts)], int((~keep).sum())


def _note(count: list, rows: np.ndarray, table: Table, shard: str) -> None:
    """Counts, and keeps where the first one lies."""
    if rows.any():
        count[1] = count[1] or f"sample {table.key(int(rows.argmax()))!r} in {shard}"
        count[0] += int(rows.sum())


def _refuse(index: Index, fields: Mapping[str, str], lacking: list, silent: list) -> None:
    total = len(index)
    if lacking[0]:
        absent = next((f for f, m in fields.items() if not index.table(0).has(m).any()), next(iter(fields)))
        alike = [member for member in index.members if is_alike(member, fields[absent])]
        raise Refusal(
            f"{lacking[0]} of {total} samples lack a member of data.fields ({', '.join(f'{m!r}' for m in fields.values())}), "
            f"first {lacking[1]}. The shards have {', '.join(index.members)}; "
            + (
                f"set data.fields.{absent} to {' or '.join(alike)}, remove"
                if alike
                else f"none is read as {fields[absent]} is: remove"
            )
            + " the field, or leave such samples out: +data.filters.complete=true."
        )
    if silent[0]:
        field = next(f for f, m in fields.items() if is_text(m))
        raise Refusal(
            f"{silent[0]} of {total} samples have an empty {field} (data.fields.{field}), first {silent[1]}. "
            f"Leave them out, +data.filters.caption_length=[1,null], give them words, or do without: ~data.fields.{field}."
        )


def check_rules(rules: Mapping[str, Any]) -> None:
    """Looks at the rules alone.

    Raises:
        Refusal: one is none.
    """
    for name, rule in rules.items():
        if name == "missing" and rule not in ("refuse", "keep", "drop"):
            raise Refusal(f"data.filters.missing={rule!r}; wanted `refuse`, `keep` or `drop`.")
        if name in ("unique", "complete") and not isinstance(rule, bool):
            raise Refusal(f"data.filters.{name}={rule!r}; wanted `true` or `false`.")
        if name not in WORDS and not _is_range(rule):
            raise Refusal(f"data.filters.{name}={rule!r}: wanted the least and the most, such as [256, null].")


def _is_range(rule: Any) -> bool:
    ends = [end for end in rule if end is not None] if isinstance(rule, list | tuple) and len(rule) == 2 else [""]
    return all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends) and ends == sorted(ends)


def _save(selections: Sequence[Selection], report: Mapping[str, Any], folder: Path) -> None:
    with whole_folder(folder) as part:
        for i, selection in enumerate(selections):
            np.save(part / f"{i}.counts.npy", selection.counts)
            if selection.rows is not None:
                np.save(part / f"{i}.rows.npy", selection.rows)
        write_json({**report, "selections": len(selections)}, part / "report.json")


def _load(folder: Path, i: int) -> Selection:
    rows = folder / f"{i}.rows.npy"
    return Selection(np.load(folder / f"{i}.counts.npy"), np.load(rows, mmap_mode="r") if rows.is_file() else None)
