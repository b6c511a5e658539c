"""Tables of captions, read strictly: each row becomes a picture to pack or one with a fault.

A table is a .csv or .tsv whose first line names the columns, a .jsonl with an object in each line, a .json with a list of
objects, or a .parquet. One column names the picture, one has its caption, the others go into the records. A table that could be
read in more ways than one is refused, with the line and what to change.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.data.packing.packed import Packed, Row
from ldm.errors import Refusal
from ldm.files.lines import TABLES  # and .txt, where it is named
from ldm.files.picture import ENDINGS as STILL

PICTURES = ("file_name", "image", "path", "file", "filename", "image_path", "url")  # columns that name a picture
CAPTIONS = ("caption", "text", "prompt", "title")
ENDINGS = (*STILL, ".gif")  # which is packed, and said where it has several frames
DELIMITERS = ",;\t|"


class Line(NamedTuple):
    """A row of a CSV file, and the lines of text that it spans."""

    first: int
    last: int
    cells: list[str]


def read_table(path: Path, packed: Packed) -> list[Row]:
    """The rows of a table, in its order.

    Raises:
        Refusal: it is no table, lacks a column that is needed, or can be read in more ways than one.
    """
    if path.suffix.lower() not in (*TABLES, ".txt"):
        raise Refusal(f"{path} is no table of captions: wanted a folder, or a {', '.join(TABLES)}.")
    kind = path.suffix.lower()
    read = _objects if kind in (".jsonl", ".json") else partial(_csv, packed=packed)
    lines = _parquet(path) if kind == ".parquet" else read(path, read_text(path))
    if not lines:
        raise Refusal(f"{path} has no rows.")
    columns = list(dict.fromkeys(name for _, line in lines if isinstance(line, Mapping) for name in line))
    _check_columns(path, columns)
    taken: Counter[str] = Counter()
    rows = [_entry(path, where, line, taken) for where, line in lines]
    packed.notes.append(f"{path.name}: the columns of pictures and captions are {', '.join(taken)}") if taken else None
    files = Counter(os.path.abspath(row.file) for row in rows if not row.fault)
    if twice := sum(count > 1 for count in files.values()):
        packed.notes.append(f"{path.name}: each row is a sample; pictures that several rows name: {twice:,}")
    return rows


def read_text(path: Path) -> str:
    """UTF-8, or UTF-16 that says so in its first bytes; lines end in a newline, however they end in the file.

    Raises:
        Refusal: it is neither; names the line.
    """
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refusal(f"{path} cannot be read as text in UTF-8: line {line}: {error}. Save it as UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise Refusal(f"{path} cannot be read as text in UTF-8: line {line} holds a zero byte. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def named(columns: Mapping[str, Any] | Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that is there, in any case, as it is spelt there."""
    spelt = {name.lower(): name for name in columns}
    return next((spelt[name] for name in wanted if name in spelt), None)


def parse(text: str) -> Any:
    """JSON to values: NaN, which JSON does not know, is null.

    Raises:
        Refusal: it is none, or an object says the same twice.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else name, object_pairs_hook=_once)
    except RecursionError as error:
        raise Refusal("nested too deeply") from error


def text_of(value: Any) -> str | None:
    """A caption as text: null is an empty one, a number is its digits; None where it is neither."""
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise Refusal(f"it says {twice[0]!r} twice")
    return dict(pairs)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if named(columns, PICTURES) is None or named(columns, CAPTIONS) is None:
        raise Refusal(
            f"{path} has the columns {', '.join(columns) or 'none'}; wanted one that names the picture ({', '.join(PICTURES)}) "
            f"and one with its caption ({', '.join(CAPTIONS)}). The first line of a .csv or .tsv names the columns, each line "
            "of a .jsonl is an object."
        )


def _entry(path: Path, where: str, line: Any, taken: Counter[str]) -> Row:
    """A row of a table; `taken` counts the columns that picture and caption come from."""
    here = f"{where} of {path.name}"
    if isinstance(line, ValueError):
        return Row(here, fault=f"no JSON: {line}")
    if not isinstance(line, Mapping):
        return Row(here, fault=f"no JSON object, but {line!r:.40}")
    picture, caption = named(line, PICTURES), named(line, CAPTIONS)
    for column in (picture, caption):
        spelt = [name for name in line if column and name.lower() == column.lower()]
        if len(spelt) > 1:
            return Row(here, fault=f"it has the columns {' and '.join(spelt)}; keep one of them")
    if picture is None or not isinstance(line[picture], str) or not line[picture].strip():
        return Row(here, fault=f"it names no picture ({picture or ', '.join(PICTURES)})")
    taken.update(name for name in (picture, caption) if name)
    name, words = line[picture].strip(), text_of(line[caption]) if caption else ""
    row = Row(name, _locate(path.parent, name), words or "")
    row.columns = {column: value for column, value in line.items() if column not in (picture, caption)}
    if words is None:
        kind = {list: "a list", dict: "an object", bool: "a truth value"}[type(line[caption])]
        row.fault = f"{here}: its {caption} is no text, but {kind}: {line[caption]!r:.60}; wanted one text, a row for each"
    elif "://" in name:
        row.fault = f"{here}: an address; img2dataset fetches pictures, pack takes files"
    else:
        row.fault = _missing(row.file, here)
    return row


def _missing(file: Path, here: str) -> str:
    """Why there is no such file, empty where there is one."""
    try:
        return "" if file.exists() else f"{here}: there is no such file in {file.parent}"
    except OSError as error:  # a name that is longer than any, a folder that may not be read
        return f"{here}: {error.strerror}"


def _locate(folder: Path, name: str) -> Path:
    """A path as it is written, as Windows writes it, or with its accents as another system spells them."""
    slashes = name.replace("\\", "/")
    spellings = (name, slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")))
    return folder / next((one for one in spellings if os.path.exists(folder / one)), slashes)


def _parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """-> where each row stands, and what it holds.

    Raises:
        Refusal: it is damaged, or holds the pictures themselves.
    """
    try:
        table = pq.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Refusal(f"{path} cannot be read as Parquet: {error}") from error
    picture = named(table.column_names, PICTURES)
    kind = table.schema.field(picture).type if picture else pa.null()
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise Refusal(
            f"{path}: its column {picture} is of the type {kind}; wanted the names of files. Where it holds the pictures "
            f"themselves, train on them as they are: data=hf data.name=parquet data.data_dir={path.parent}."
        )
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _objects(path: Path, text: str) -> list[tuple[str, Any]]:
    """-> where it stands and what it holds, for each line of a .jsonl, or each item of a list; an error where it is no JSON."""
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        try:
            items = parse(text)
        except ValueError as error:
            raise Refusal(f"{path} is no JSON: {error}. Wanted a list of objects, or one in each line of a .jsonl.") from error
        if not isinstance(items, list):
            raise Refusal(
                f"{path} is no list of objects, but {type(items).__name__}: {text.strip()[:40]} ... Wanted an object for each "
                'caption: [{"file_name": "a.jpg", "caption": "a dog"}, ...]; of COCO\'s annotations write such a list.'
            )
        return [(f"row {number}", item) for number, item in enumerate(items, 1)]
    return [(f"line {number}", _parsed(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(line: str) -> Any:
    try:
        return parse(line)
    except ValueError as error:
        return error


def _csv(path: Path, text: str, packed: Packed) -> list[tuple[str, dict[str, Any]]]:
    """-> where each row stands, and its cells by column, those that are numbers as numbers."""
    first = text.partition("\n")[0]
    choices = "\t" if path.suffix.lower() == ".tsv" else DELIMITERS
    headers = {d: [name.strip() for name in next(csv.reader([first], delimiter=d), [])] for d in choices}
    fitting = [d for d, names in headers.items() if named(names, PICTURES) and named(names, CAPTIONS)]
    delimiter = fitting[0] if fitting else max(choices, key=first.count)
    names = [name or f"column_{number}" for number, name in enumerate(headers[delimiter], 1)]
    _check_columns(path, names)
    picture, caption = named(names, PICTURES), named(names, CAPTIONS)
    for name, count in Counter(names).items():
        if count > 1 or (sum(n.lower() == name.lower() for n in names) > 1 and name in (picture, caption)):
            raise Refusal(f"{path} line 1 names the column {name} twice; rename one of them.")
    lines, raw = _lines(path, text, delimiter, len(names), packed), text.split("\n")
    joined, rows = 0, []
    for line in lines[1:]:
        if not any(cell.strip() for cell in line.cells):
            packed.count(f"empty rows of {path.name}", bool(line.cells))
            continue
        cells = line.cells
        if len(cells) > len(names) == 2 and names == [picture, caption] and '"' not in raw[line.first - 1]:
            cells, joined = raw[line.first - 1].split(delimiter, 1), joined + 1
        _check_line(path, line, cells, names, delimiter, raw)
        values = (cell if name in (picture, caption) else _value(cell) for name, cell in zip(names, cells))
        rows.append((f"line {line.first}", dict(zip(names, values))))
    if joined:
        packed.notes.append(f"{path.name}: all that follows the first {delimiter!r} is the caption ({joined:,} rows have more)")
    return rows


def _lines(path: Path, text: str, delimiter: str, width: int, packed: Packed) -> list[Line]:
    """The rows of a CSV file: by its quotation marks, or, where these cannot be such, with marks that are letters like others."""
    try:
        return _split(text, delimiter, csv.QUOTE_MINIMAL)
    except ValueError as error:
        plain = _split(text, delimiter, csv.QUOTE_NONE)
        cells = [cell for line in plain for cell in line.cells]
        wrapped = any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)
        if wrapped or any(len(line.cells) not in (0, width) for line in plain):
            raise Refusal(
                f'{path} {error}. Write a cell that holds quotation marks as "a ""stop"" sign", and close each that is opened.'
            ) from error
        packed.notes.append(f"{path.name}: quotation marks are taken for letters, since {error}")
        return plain


def _split(text: str, delimiter: str, quoting: int) -> list[Line]:
    reader, lines, first = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True), [], 1
    try:
        for cells in reader:
            lines.append(Line(first, reader.line_num, cells))
            first = reader.line_num + 1
    except csv.Error as error:
        raise Refusal(f"line {first} cannot be read: {error}") from error
    return lines


def _check_line(path: Path, line: Line, cells: list[str], names: list[str], delimiter: str, raw: list[str]) -> None:
    """Makes sure that a row has a cell for each column, and that its quotation marks take in no other row.

    Raises:
        Refusal: it does not.
    """
    if len(cells) != len(names):
        raise Refusal(
            f"{path} line {line.first} has {len(cells)} cells, the first line names {len(names)} columns. A cell that holds "
            f'{delimiter!r} or a line break is written in quotation marks: "a dog{delimiter} running".'
        )
    if line.last == line.first:
        return
    inside = (cell.strip(' "') for text in raw[line.first - 1 : line.last] for cell in text.split(delimiter))
    if other := next((c for c in inside if c.lower().endswith(ENDINGS) and c not in map(str.strip, cells)), None):
        raise Refusal(
            f"{path} line {line.first} opens a quotation mark that ends in line {line.last} and takes in {other}, which looks "
            "like a row of its own. Close it in its line, or double the marks that belong to a caption."
        )


def _value(cell: str) -> Any:
    """A cell of a CSV file, as a number or list where it is one."""
    try:
        value = parse(cell)
    except ValueError:
        return cell
    return cell if value is None or isinstance(value, str) else value
