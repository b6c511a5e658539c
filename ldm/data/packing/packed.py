"""What pack has done, as it is said: what became a sample, what did not and why, and the commands that train on it."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.files.called import command_line

STEP = 8  # pixels: the small recipes halve a picture three times
CLIP = 32  # pixels that experiment=emoji/clip looks at; larger pictures are brought down to them
NO_CLIP = {"training.perceptual": "null"}


@dataclass
class Row:
    """A picture that is to be packed.

    Args:
        name: what it is called in what is printed, and in its record's `url`.
        file: None where nothing names one; `fault` says why.
        caption: empty where there is none.
        label: its class, the name of a sub-folder.
        columns: what else is known of it, under the names that its table or record gives them.
        fault: why it cannot be packed, empty where nothing is known against it.
    """

    name: str
    file: Path | None = None
    caption: str = ""
    label: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass
class Packed:
    """What went into the shards, and what did not.

    Args:
        counts: pictures of "train" and "val"; "silent", those of them without a caption; "frames", those with more than one.
        classes: each class' number.
        skipped: pictures and rows that could not be packed, each with the reason.
        passed_over: how many files there were of each kind that is not packed.
        notes: how the source was read, where it could have been read otherwise.
        renamed: columns whose names are those of a record's own keys, each with its new name.
        dropped: how many values of a column JSON cannot hold.
        sides: shorter sides of the pictures as they are packed, in pixels.
    """

    counts: Counter[str] = field(default_factory=Counter)
    classes: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)

    def count(self, kind: str, number: int = 1) -> None:
        """Counts files or rows of a kind that is not packed."""
        if number:
            self.passed_over[kind] += number


def found(packed: Packed) -> str:
    """-> a sentence about the files of a source without pictures; nothing where there are none."""
    kinds = "; ".join(f"{count:,} {kind}" for kind, count in packed.passed_over.most_common())
    return f" Found {kinds}." if kinds else ""


def say_left_out(packed: Packed) -> None:
    """Prints what could not be packed, a line each, to stderr."""
    for name, why in packed.skipped:
        print(f"left out: {name}: {why}", file=sys.stderr)


def say(packed: Packed) -> None:
    """Prints how many samples there are, how the source was read, and how many files are not in the shards."""
    counts = packed.counts
    held_out = f", {counts['val']:,} of them held out" if counts["val"] else ""
    print(f"{counts['train'] + counts['val']:,} pictures{held_out}; {counts['silent']:,} without a caption")
    if packed.skipped:
        print(f"{len(packed.skipped):,} left out, each named above")
    if packed.classes:
        shown = ", ".join(list(packed.classes)[:8]) + (", ..." if len(packed.classes) > 8 else "")
        print(f"{len(packed.classes):,} classes, by sub-folder, numbered to {max(packed.classes.values())}: {shown}")
    if counts["frames"]:
        print(f"{counts['frames']:,} pictures have several frames or pages: the first is packed")
    lines = [*packed.notes]
    if packed.renamed:
        pairs = ", ".join(f"{old} -> {new}" for old, new in packed.renamed.items())
        lines.append(f"columns renamed, since each record has a key of that name: {pairs}")
    lines += [
        f"column {n}: {count:,} values left out of the records: JSON has no such value" for n, count in packed.dropped.items()
    ]
    lines += [f"passed over: {count:,} {kind}" for kind, count in packed.passed_over.most_common()]
    print("\n".join(lines).encode("utf-8", "backslashreplace").decode(), end="\n" if lines else "")  # half a surrogate pair


def commands(packed: Packed, out: Path, val: bool) -> list[str]:
    """The commands that train on the shards, one stage after the other, as README has them."""
    data = {"data": "shards", "data.train": out / "train" if val else out}
    data |= {"data.val": out / "val"} if val else {}
    runs = re.sub(r"[^A-Za-z0-9_.-]+", "-", out.resolve().name).strip("-.") or "mine"
    size = {"data.size": _size(packed.sides)}
    autoencoder = {"experiment": "emoji/autoencoder", "run_id": f"{runs}/autoencoder", **data, **size}
    diffusion = {"run_id": f"{runs}/diffusion", **data, **size, "autoencoder.path": f"runs/{runs}/autoencoder"}
    if packed.counts["silent"] == packed.counts["train"] + packed.counts["val"]:  # nothing that a CLIP could learn from
        stages = [autoencoder | NO_CLIP, {"experiment": "emoji/unconditional", **diffusion}]
    else:
        spoken = {"+data.filters.caption_length": "[1,null]"} if packed.counts["silent"] else {}
        clip = f"local-dir:runs/{runs}/clip"
        stages = [
            {"experiment": "emoji/clip", "run_id": f"{runs}/clip", **data, "data.size": CLIP, **spoken},
            {**autoencoder, "loss.model": clip},
            {"experiment": "emoji/text", **diffusion, **spoken, "condition.text.model": clip},
        ]
    return [shlex.join([*command_line("train").split(), *(f"{key}={value}" for key, value in words.items())]) for words in stages]


def _size(sides: Counter[int]) -> int:
    """The median of the shorter sides, down to a size that the recipes take."""
    ordered = sorted(sides.elements())
    return max(STEP, ordered[len(ordered) // 2] // STEP * STEP)
