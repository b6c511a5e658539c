"""What is in these shards, and what is broken:  python -m ldm doctor SHARDS [--filters ...] [--repair OUT]

Prints counts, damage with its reasons, sizes, captions, duplicates, and what filters and buckets would keep; writes the same as
report.json, histograms.png and samples.png. The exit code is 0 only where every shard and every sample can be read.

Without --fields every sample must have the members that most have, and all of these must be readable.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from tqdm import tqdm

from ldm.check import check_counts
from ldm.data.batch.samples import Samples
from ldm.data.order.bucket import Size, assign, sizes_of
from ldm.data.order.filter import apply, check_rules, table_of
from ldm.data.order.order import generator
from ldm.data.shard.decode import BadSample, View, is_image, is_text
from ldm.data.shard.folded import folded
from ldm.data.shard.index import Index
from ldm.data.shard.repair import LOST, claim, is_known, repair
from ldm.data.shard.selection import Selection
from ldm.data.shard.source import expand, passed_over
from ldm.data.shard.tar import unread
from ldm.errors import Refusal
from ldm.files.folder import write_text
from ldm.files.table import show

BARS = "▁▂▃▄▅▆▇█"
SHOWN = 24  # pictures in samples.png
MOST = 32  # members that are printed
# Those there are of fonts that have what captions may need.
FONTS = [f for f in ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS") if f in get_font_names()]
FIELDS = {"image": "jpg", "caption": "txt"}  # where no shard can be asked


def main(arguments: Sequence[str] | None = None) -> int:
    """-> 0 where all is healthy, 1 where something is broken, 2 where the question was."""
    plt.switch_backend("Agg")
    options = _parser().parse_args(arguments)
    try:
        check_counts(size=options.size)
        check_rules(options.filters)
        sizes = sizes_of(options.buckets, options.size)
        options.out = options.out or Path("runs", "doctor", Path(options.shards[0]).absolute().name.removesuffix(".tar"))
        index = Index(expand(options.shards, "SHARDS"), damaged="leave_out")
        print(*(f"passed over: {line}\n" for line in passed_over(options.shards)), sep="", end="")
        fields = dict(options.fields) or _common(index)
        if options.repair:
            claim(options.repair, index, fields)
        several = folded(index, _count_members(index), dict(options.fields).values())
        report = examine(index, fields, options.size, options.filters, sizes, options.quick, options.out, several)
        if options.repair:
            whole, lost = repair(index, fields, options.repair)
            print(f"{whole:,} whole samples are in {options.repair}; {lost:,} lines in {options.repair / LOST} name the others")
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if report["healthy"] else 1


def examine(
    index: Index,
    fields: dict[str, str],
    size: int,
    filters: dict,
    sizes: Sequence[Size],
    quick: bool,
    out: Path,
    several: dict[str, str],
) -> dict[str, Any]:
    """Looks at every sample, prints what it finds and writes it into `out`.

    Args:
        index: of the shards.
        fields: batch field -> member, which every sample should have.
        size: pixels of what is shown.
        filters, sizes: of data.filters and data.buckets, of which it is said what they would keep.
        quick: decodes none but those shown.
        several: shards in which samples share a key, and how (folded.py).
        out: the folder that the report is written into.
    """
    samples = Samples(index, Selection(index.counts), fields, size)
    would_keep = _would_keep(index, fields, filters, sizes) if index.shards and (filters or len(sizes) > 1) else ""
    bad = {} if quick else _read_all(samples)
    report: dict[str, Any] = {
        "shards": len(index.shards) + len(index.damage),
        "samples": len(index),
        "damaged": index.damage,
        "bad": bad,
        "folded": several,
        "unread": _unread(index),
        **_members(index, fields),
        **_duplicates(index),
    }
    report["healthy"] = not (index.damage or bad or several or any(report["lacking"].values()))
    columns = _columns(index)
    report["numbers"] = {name: _summary(values) for name, values in columns.items() if len(values)}
    report["would_keep"] = would_keep.splitlines()
    _say(report, columns)
    print(would_keep, end="\n" if would_keep else "")
    write_text(json.dumps(report, indent=2, ensure_ascii=False), out / "report.json")
    _draw(columns, out / "histograms.png")
    if len(index):
        _show(samples, out / "samples.png")
    print(f"{'Healthy' if report['healthy'] else 'NOT healthy'}; the report and its pictures are in {out}")
    return report


def _unread(index: Index) -> dict[str, list[str]]:
    """shard -> its files without an ending, which are of no sample."""
    files = {}
    for shard in index.shards:
        with index.fetch.held(shard) as path:
            files[shard] = unread(path)
    return {shard: names for shard, names in files.items() if names}


def _common(index: Index) -> dict[str, str]:
    """The members that most samples have, each as a field of its own name."""
    counts = Counter({member: count for member, count in _count_members(index).items() if is_known(member)})
    most = [member for member, count in counts.items() if 2 * count > len(index)]
    pictures = [member for member, _ in counts.most_common() if is_image(member)]
    if pictures and not any(map(is_image, most)):  # of several names, none of which most have
        most.append(pictures[0])
    return {member: member for member in most} or FIELDS


def _read_all(samples: Samples) -> dict[str, str]:
    """Decodes every sample; -> key and reason of those that cannot be."""
    bad = {}
    for i in tqdm(range(len(samples)), desc="reading samples", unit="sample"):
        shard, row = samples.selection.locate(i)
        for member in samples.fields.values():
            if samples.index.table(shard).has(member)[row]:
                try:
                    samples.read(shard, row, member, View(samples.size, samples.size))
                except BadSample as error:
                    bad[str(samples.where(shard, row))] = str(error)
    return bad


def _count_members(index: Index) -> Counter[str]:
    counts: Counter[str] = Counter()
    for s in range(len(index.shards)):
        table = index.table(s)
        counts += Counter({member: int(table.has(member).sum()) for member in table.members})
    return counts


def _members(index: Index, fields: dict[str, str]) -> dict[str, Any]:
    counts = _count_members(index)
    silent = sum(int((index.table(s).column("caption_length") == 0).sum()) for s in range(len(index.shards)))
    lacking = {member: len(index) - counts[member] for member in fields.values()}
    return {"members": dict(counts), "lacking": lacking, "empty_captions": silent}


def _duplicates(index: Index) -> dict[str, Any]:
    hashes = np.concatenate([index.table(s).column("hash") for s in range(len(index.shards))] or [np.empty(0)])
    known = hashes[hashes != 0]
    return {"hashed": len(known), "duplicates": len(known) - len(np.unique(known))}


def _columns(index: Index) -> dict[str, np.ndarray]:
    """What is drawn and summed up: sizes, aspect ratio, caption lengths, and every number of the records."""
    tables = [index.table(s) for s in range(len(index.shards))]
    names = list(dict.fromkeys(name for table in tables for name in table.numbers))
    columns = {n: np.concatenate([t.column(n) for t in tables if t.column(n) is not None]) for n in names}
    if columns:
        columns["width / height"] = columns["width"] / columns["height"]
    return {name: values[np.isfinite(values)] for name, values in columns.items()}


def _summary(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [0, 50, 100]).tolist()
    return {"least": low, "median": median, "most": high, "known": len(values)}


def _would_keep(index: Index, fields: dict[str, str], filters: dict, sizes: list) -> str:
    silent = {"caption_length": [1, None]} if any(is_text(member) for member in fields.values()) else {}
    selection, dropped = apply(index, fields, {"complete": True, **silent, **filters})
    lines = [table_of(len(index), dropped)]
    if len(sizes) > 1:
        parts = assign(index, selection, sizes)
        lines += [f"{h:5d} x {w:<5d} {len(part):12,d}" for (h, w), part in zip(sizes, parts) if len(part)]
    return "\n".join(lines)


def _say(report: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
    print(f"{report['shards']:,} shards, {report['samples']:,} samples")
    for shard, why in report["damaged"].items():
        print(f"  DAMAGED {shard} {why}")
    for where, why in report["bad"].items():
        print(f"  BAD {where}: {why}")
    for shard, what in report["folded"].items():
        print(f"  FOLDED {shard}: {what}; a key ends at the first dot of a name")
        print("    Write img_0001.jpg for img.0001.jpg, or name the members that are meant with --fields.")
    for shard, names in report["unread"].items():
        print(f"  UNREAD {shard}: {len(names):,} files without an ending are of no sample, such as {names[0]}")
    shown = [f"{member} {count:,}" for member, count in report["members"].items()]
    print("members: " + ", ".join(shown[:MOST]) + (f" and {len(shown) - MOST:,} more" if len(shown) > MOST else ""))
    if strange := [text for member, text in zip(report["members"], shown) if not is_known(member)]:
        print(f"  NOT READ, being of no kind that shards hold: {', '.join(strange[:MOST])}")
    for member, count in report["lacking"].items():
        if count:
            print(f"  LACKING {member!r}: {count:,} samples")
    print(
        f"empty captions: {report['empty_captions']:,}; duplicates: {report['duplicates']:,} of {report['hashed']:,} with a hash"
    )
    shares = ("least", "median", "most")
    rows = [[name, *(f"{of[share]:10.4g}" for share in shares), _bars(columns[name])] for name, of in report["numbers"].items()]
    if rows:
        show(("number", *(f"{share:>10s}" for share in shares), "how many of each"), rows, headed=True)


def _bars(values: np.ndarray) -> str:
    counts = np.histogram(values, bins=24)[0]
    return "".join(" " if c == 0 else BARS[int((len(BARS) - 1) * c / counts.max())] for c in counts)


def _draw(columns: dict[str, np.ndarray], path: Path) -> None:
    shown = [
        name
        for name in ("width", "height", "width / height", "original_width", "original_height", "caption_length")
        if name in columns
    ]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, name in zip(axes.flat, shown):
        axis.hist(columns[name], bins=40, color="#4477aa")
        axis.set_title(name.replace("_", " "), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    _save(figure, path)


def _show(samples: Samples, path: Path) -> None:
    """Samples drawn at random, with their captions."""
    picture = next((member for member in samples.fields.values() if is_image(member)), None)
    text = next((member for member in samples.fields.values() if is_text(member)), None)
    if picture is None:
        return
    rows = min(SHOWN // 6, -(-len(samples) // 6))
    figure, axes = plt.subplots(rows, 6, figsize=(12, 2.25 * rows), layout="constrained", squeeze=False)
    chosen = iter(generator(0, 0).permutation(len(samples))[: 4 * SHOWN].tolist())
    for axis in axes.flat:
        axis.set_axis_off()
        for i in chosen:
            shard, row = samples.selection.locate(i)
            try:
                image = samples.read(shard, row, picture, View(samples.size, samples.size))
                caption = samples.read(shard, row, text, View(1, 1)) if text else ""
            except BadSample:
                continue
            axis.imshow(image.permute(1, 2, 0).numpy())
            lines = textwrap.wrap(caption, 36, max_lines=2, placeholder=" ...")
            axis.set_title("\n".join(lines).replace("$", r"\$"), fontsize=7, family=FONTS)
            break
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a script that no font here has
        figure.savefig(path, dpi=110)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ldm doctor", description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", help="folders, tars, globs, brace patterns")
    parser.add_argument("--fields", type=_field, nargs="+", default=[], help="as data.fields: image=jpg caption=txt")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--filters", type=_mapping, default={}, help="as data.filters: '{side: [256, null]}'")
    parser.add_argument("--buckets", type=_setting, default=None, help="as data.buckets: sdxl, '{step: 64, ratio: 2}', ...")
    parser.add_argument("--quick", action="store_true", help="headers and captions only: no picture is decoded")
    parser.add_argument("--out", type=Path, help="folder for report.json and the pictures; by default runs/doctor/NAME")
    parser.add_argument("--repair", type=Path, metavar="OUT", help="writes all that can be read into clean shards; goes on there")
    return parser


def _setting(text: str) -> Any:
    """What a config would take it for."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML: {error}") from error


def _mapping(text: str) -> dict[str, Any]:
    setting = _setting(text)
    if not isinstance(setting, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted {{name: value, ...}}")
    return setting


def _field(text: str) -> tuple[str, str]:
    field, _, member = text.partition("=")
    if not is_known(member):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted FIELD=MEMBER, a member that is read from shards, such as image=jpg")
    return field, member
