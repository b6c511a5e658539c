"""The pictures of a folder or table, each with its caption, class and record; other files are counted, each with its kind."""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.packing.packed import Packed, Row
from ldm.data.packing.table import CAPTIONS, ENDINGS, TABLES, named, parse, read_table, read_text, text_of
from ldm.errors import NotFound, Refusal
from ldm.files.picture import is_hidden, natural, sheets

METADATA = tuple(
    f"metadata{ending}" for ending in (".jsonl", ".csv", ".tsv", ".parquet")
)  # a table of the pictures in its folder, and below
WORDS, RECORD = (".txt", ".caption"), ".json"  # what may lie beside a picture
SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval)([^a-z].*)?")  # test, train2017, val_images
NUMBERED = re.compile(r"\d+[_.]+(?=\S)")  # 10_sks dog, 001.albatross
CHUNK = 5  # digits of a sub-folder that is one of many parts, as 00000 is, and no class


def find(source: Path, packed: Packed) -> list[Row]:
    """The pictures of a source; what else lies there is counted in `packed`.

    Raises:
        NotFound: there is no such source.
        ValueError: a table that cannot be read in one way only, or folders of several splits.
    """
    if not source.exists():
        raise NotFound(f"There is no {source}.")
    if source.is_file():
        rows = read_table(source, packed)
        _count_unnamed(rows, source, packed)
        return rows
    names = sorted(_files(source, packed), key=natural)
    drawn = sheets(names)
    pictures = [name for name in names if name.suffix.lower() in ENDINGS and name not in drawn]
    tables = _tables(source, names)
    _refuse_splits(source, pictures, tables)
    rows, listed = [], dict[str, Path]()
    for table in tables.values():
        rows += (named := read_table(source / table, packed))
        files = {os.path.abspath(row.file) for row in named if row.file}
        if twice := sorted(files & listed.keys()):
            raise Refusal(f"{source / listed[twice[0]]} and {source / table} both name {twice[0]}; keep it in one of them.")
        listed |= dict.fromkeys(files, table)
    alone = []
    for name in pictures:
        table = next((tables[folder] for folder in name.parents if folder in tables), None)
        if table is None:
            alone.append(name)
        elif os.path.abspath(source / name) not in listed:
            packed.count(f"pictures that no row of {table} names")
    beside = _beside(alone, names)
    used = {*pictures, *tables.values(), *(name for files in beside.values() for name in files)}
    for name in names:
        if name not in used:
            covered = next((tables[folder] for folder in name.parents if folder in tables), None)
            packed.count("sheets that `ldm sample` wrote beside its pictures" if name in drawn else _kind(name, covered))
    labels = {} if tables else _labels(source, pictures, any(beside.values()), packed)
    words = _words_of(sorted(set(labels.values())), packed)
    return rows + [_row(source, name, beside[name], labels.get(name), words) for name in alone]


def _files(source: Path, packed: Packed) -> list[Path]:
    """All files below a folder but hidden ones, relative to it; a folder that is linked is gone into once, a circle never."""
    files, seen = [], {os.path.realpath(source)}

    def unreadable(error: OSError) -> None:
        packed.skipped.append((str(error.filename), f"{type(error).__name__}: {error.strerror}"))

    for folder, folders, names in os.walk(source, followlinks=True, onerror=unreadable):
        hidden = [name for name in (*folders, *names) if is_hidden(name)]
        packed.count("hidden files and folders", len(hidden))
        entered = []
        for name in sorted(set(folders) - set(hidden)):
            path = os.path.realpath(os.path.join(folder, name))
            packed.count("folders that are read already, by another link", path in seen)
            entered += [] if path in seen else [name]
            seen.add(path)
        folders[:] = entered
        files += [Path(folder, name).relative_to(source) for name in names if name not in hidden]
    return files


def _tables(source: Path, names: Sequence[Path]) -> dict[Path, Path]:
    """-> folder -> the table of its pictures, both relative to the source."""
    tables: dict[Path, Path] = {}
    for name in names:
        if name.name.lower() in METADATA:
            if other := tables.get(name.parent):
                raise Refusal(f"{source / other} and {source / name} both speak of the same pictures; keep one of them.")
            tables[name.parent] = name
    return tables


def _refuse_splits(source: Path, pictures: Sequence[Path], tables: dict[Path, Path]) -> None:
    """Folders train/ and test/ are data sets that are kept apart, and no classes."""
    inside = {folder for name in [*pictures, *tables.values()] for folder in name.parents}
    splits = defaultdict(dict)
    for folder in sorted(inside):
        if match := SPLIT.fullmatch(folder.name.lower()):
            splits[folder.parent][folder.name] = match[1]
    for parent, folders in splits.items():
        if len(set(folders.values())) > 1:
            lines = "; ".join(shlex.join(["python", "-m", "ldm", "pack", str(source / parent / n), f"OUT/{n}"]) for n in folders)
            raise Refusal(
                f"{source / parent} holds {', '.join(f'{name}/' for name in folders)}: splits of a data set that are no classes, "
                f"and that would be mixed in one. Pack each by itself: {lines}."
            )


def _base(pictures: Sequence[Path]) -> int:
    """How many folders all pictures have in common."""
    shared = os.path.commonpath([name.parent for name in pictures]) if pictures else ""
    return len(Path(shared).parts)


def _labels(source: Path, pictures: Sequence[Path], described: bool, packed: Packed) -> dict[Path, str]:
    """-> picture -> class, the sub-folder that it lies in; empty where sub-folders are no classes, which is said."""
    base = _base(pictures)
    tops = {_readable(name.parts[base]) for name in pictures if len(name.parts) > base + 1}
    if len(tops) < 2:
        return {}
    stray = sum(len(name.parts) == base + 1 for name in pictures)
    chunks = all(top.isdecimal() and len(top) >= CHUNK for top in tops)
    why = "captions or records lie beside pictures" if described else ""
    why = why or (f"{stray:,} pictures lie outside of them" if stray else "")
    why = why or ("their names are numbers of chunks" if chunks else "")
    if why:
        packed.notes.append(f"sub-folders of {source} are no classes here: {why}")
        return {}
    packed.classes = _numbered(tops)
    return {name: _readable(name.parts[base]) for name in pictures}


def _numbered(names: set[str]) -> dict[str, int]:
    """-> class -> number: itself where all are numbers, else its place in their order."""
    numbers = {name: int(name) for name in names if name.isdecimal()}
    if len(set(numbers.values())) == len(names) and max(numbers.values()) < 10**CHUNK:
        return dict(sorted(numbers.items(), key=lambda item: item[1]))
    return {name: number for number, name in enumerate(sorted(names))}


def _beside(pictures: Sequence[Path], names: Sequence[Path]) -> dict[Path, list[Path]]:
    """-> picture -> its captions and records: cat.txt or cat.jpg.txt of cat.jpg, spelt the same where one of them is."""
    exact, folded = defaultdict(list), defaultdict(list)
    for name in names:
        if name.suffix.lower() in (*WORDS, RECORD):
            exact[name.with_suffix("")].append(name)
            folded[_folded(name.with_suffix(""))].append(name)
    beside = {name: [*exact[name.with_suffix("")], *exact[name]] for name in pictures}
    used = {name for files in beside.values() for name in files}
    for name in (name for name, files in beside.items() if not files):
        loose = [*folded[_folded(name.with_suffix(""))], *folded[_folded(name)]]
        beside[name] = [file for file in loose if file not in used]
    return beside


def _folded(name: Path) -> str:
    """A path without its case, and with its accents spelt in one way."""
    return unicodedata.normalize("NFC", str(name)).lower()


def _words_of(classes: Sequence[str], packed: Packed) -> dict[str, str]:
    """-> class -> the caption of its pictures: its name, without the number that all begin with, as Kohya's repeats do."""
    numbered = bool(classes) and all(map(NUMBERED.match, classes))
    words = {name: (NUMBERED.sub("", name) if numbered else name).replace("_", " ") for name in classes}
    if numbered:
        packed.notes.append(
            f"captions are the sub-folders' names without their numbers ({classes[0]}: {words[classes[0]]}); pictures are not "
            "repeated as often as these may say"
        )
    return words


def _row(source: Path, name: Path, beside: Sequence[Path], label: str | None, words: Mapping[str, str]) -> Row:
    row = Row(_readable(name), source / name, label=label)
    if label is not None:
        row.caption = words[label]
        return row
    texts = [file for file in beside if file.suffix.lower() in WORDS]
    records = [file for file in beside if file.suffix.lower() == RECORD]
    for several in (texts, records):
        if len(several) > 1:
            row.fault = f"{' and '.join(file.name for file in several)} lie beside it; keep one of them"
            return row
    try:
        row.columns = _record(source / records[0]) if records else {}
        if texts:
            row.caption = read_text(source / texts[0]).strip()
            row.columns = {k: v for k, v in row.columns.items() if (k, v) != ("caption", row.caption)}
        else:
            row.caption = _caption_in(row.columns, name.name)
    except OSError as error:
        row.fault = f"{type(error).__name__}: {error}"
    except ValueError as error:
        row.fault = f"what lies beside it cannot be read: {error}"
    return row


def _record(path: Path) -> dict[str, Any]:
    try:
        record = parse(read_text(path))
    except ValueError as error:
        raise Refusal(f"{path.name} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise Refusal(f"{path.name} is no JSON object")
    return record


def _caption_in(record: dict[str, Any], file: str) -> str:
    """The caption of a record, which is taken out of it; the picture's own `file` name, as a title, is none."""
    name = named({k: v for k, v in record.items() if v != file}, CAPTIONS)
    words = text_of(record[name]) if name else ""
    if words is None:
        raise Refusal(f"its {name} is no text, but {record[name]!r:.60}")
    if name:
        del record[name]
    return words


def _kind(name: Path, table: Path | None) -> str:
    """Why a file is not packed."""
    ending = name.suffix.lower()
    if table and ending in (*WORDS, RECORD):
        return f"{ending}: the pictures there have their captions from {table}"
    if ending in (*WORDS, RECORD):
        return f"{ending} beside no picture"
    if ending == ".tar":
        return ".tar: no picture; shards are read as they are, by data=shards"
    if ending in TABLES:
        return f"{ending}: a table; name it as the source, and its captions are read"
    return f"{_readable(name.suffix or name.name)}: no picture that is read"


def _readable(name: object) -> str:
    """A file's name as text, also where its bytes are no UTF-8."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def _count_unnamed(rows: Sequence[Row], table: Path, packed: Packed) -> None:
    """Counts the pictures that lie beside those of a table and are named by none of its rows."""
    files = {os.path.abspath(row.file) for row in rows if row.file and os.path.exists(row.file)}
    for folder in {os.path.dirname(file) for file in files}:
        for entry in os.scandir(folder):
            if entry.name.lower().endswith(ENDINGS) and not is_hidden(entry.name) and entry.path not in files:
                packed.count(f"pictures that no row of {table.name} names")
