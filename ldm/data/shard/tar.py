"""What lies in one tar shard, strictly read, so that any sample is one read away and no damage goes unseen.

A sample is the members of one shard that share a key: the path up to the first dot of its last part. What follows that dot
names the member (`jpg`, `txt`, `map.png`). Hidden files and what lies in hidden folders (`._cat.jpg`, `.ipynb_checkpoints/`) are
no samples. Links are what they lead to in the same shard. Python's tarfile, and with it WebDataset, takes a bad header for the
end of the archive; here such a shard is damaged, and the reason is said.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ldm.errors import Refusal
from ldm.files.pointer import instead_of

_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_HIDDEN = re.compile(r"(?:^|/)\.(?!\.?/)[^/]*/")  # a folder; ./ and ../ are none
_PAX = re.compile(rb"(\d+) ([^=]+)=")  # a record of a header that changes the next one: its length, what it sets
_LONG = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}
BLOCK = 512

Spans = dict[str, dict[str, tuple[int, int]]]  # key -> member -> (offset, size)


class Damaged(Refusal):
    """A shard is not a whole tar, or not the one that its statistics speak of."""


def read_headers(path: str | Path) -> Spans:
    """-> key -> member -> (offset, size) in bytes, in the shard's order.

    Raises:
        Damaged: a bad header, no end mark, data behind it, a member twice, sparse, or a link to what is not there, another count
            than in `_stats.json`, no samples.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            samples = _read_members(tar)
            _check_end(path, tar.offset)
    except Exception as error:  # whatever a broken header leads tarfile to
        why = f"is damaged or no plain tar: {_words(str(error)) or type(error).__name__}"
        raise Damaged(f"{why}.{instead_of(Path(path))}".removesuffix(".")) from error
    _check_count(Path(path), len(samples))
    return samples


def salvage(path: str | Path) -> Spans:
    """What can still be read of a damaged shard: every member that has a good header and all its bytes, wherever it lies."""
    members = _Members()
    for info, at in _good_headers(Path(path)):
        with suppress(ValueError):  # of two of one name the first
            members.add(info, at)
    members.follow()
    return members.samples


def unread(path: str | Path) -> list[str]:
    """The files of a whole shard that belong to no sample, since their names have no ending; hidden ones are meant to be none."""
    with tarfile.open(path, "r:") as tar:
        names = [posixpath.normpath(_words(info.name)) for info in tar if info.isreg()]
    return [name for name in names if not _sample(name) and not _HIDDEN.search(name) and posixpath.basename(name)[0] != "."]


class _Members:
    """The members of an archive, as they come: samples, and where links lead."""

    def __init__(self) -> None:
        self.samples: Spans = {}
        self.places: dict[str, tuple[int, int]] = {}  # of all plain files, by their path
        self.links: dict[str, tuple[str, str]] = {}  # path -> the path that it leads to, and its name as it stands there
        self.folders: set[str] = set()

    def add(self, info: tarfile.TarInfo, at: int) -> None:
        """A member whose data begin at a byte.

        Raises:
            Refusal: it is there already, or its data do not lie there as they are.
        """
        info.name, info.linkname = _words(info.name), _words(info.linkname)
        name, match = posixpath.normpath(info.name), _sample(info.name)
        if info.size < 0:
            raise Refusal(f"member {info.name} has a size below 0")
        if match and (name in self.links or match[2].lower() in self.samples.get(match[1], {})):
            raise Refusal(f"member {info.name} is there twice")
        if info.issym() or info.islnk():
            start = posixpath.dirname(info.name) if info.issym() else ""
            self.links[name] = posixpath.normpath(posixpath.join(start, info.linkname)), info.name
        elif info.isdir():
            self.folders.add(name)
        elif match and (info.issparse() or not info.isreg() or info.type == tarfile.GNUTYPE_SPARSE):
            raise Refusal(f"member {info.name} is sparse or no file; pack it anew, without --sparse")
        elif info.isreg():
            self.places[name] = at, info.size
        if match and not info.isdir():
            self.samples.setdefault(match[1], {}).update({match[2].lower(): self.places[name]} if name in self.places else {})

    def follow(self) -> list[str]:
        """Gives samples what their links lead to; -> those that lead to nothing in the shard."""
        lost = []
        for end, name in self.links.values():
            match, steps = _sample(name), 0
            while end in self.links and (steps := steps + 1) <= len(self.links):
                end = self.links[end][0]
            if match and end in self.places:
                self.samples[match[1]][match[2].lower()] = self.places[end]
            elif match and end not in self.folders:
                lost.append(f"{name}, a link to {end}")
        self.samples = {key: members for key, members in self.samples.items() if members}
        return lost


def _sample(name: str) -> re.Match[str] | None:
    """Key and member of a path, None where it is of no sample."""
    return None if _HIDDEN.search(name) else _MEMBER.fullmatch(name)


def _words(name: str) -> str:
    """A name as text that can be written down: bytes that are no UTF-8 as \\udc80 and the like."""
    return name.encode("utf-8", "backslashreplace").decode()


def _read_members(tar: tarfile.TarFile) -> Spans:
    members = _Members()
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # forget what was read, or a large shard fills the memory
        members.add(info, info.offset_data)
    if lost := members.follow():
        raise Refusal(f"{len(lost)} links lead to nothing in it, such as {lost[0]}; pack it anew, with --dereference")
    return members.samples


def _check_end(path: str | Path, offset: int) -> None:
    """A whole tar ends in two blocks of zeros, and nothing but zeros follows."""
    with open(path, "rb") as file:
        file.seek(offset)
        length = 0
        while chunk := file.read(2**20):
            if chunk.count(0) != len(chunk):
                raise Refusal(f"bad header at byte {offset}, with more data behind it")
            length += len(chunk)
    if length < 2 * BLOCK:
        raise Refusal(f"cut off at byte {offset + length}, without the end mark")


def _check_count(path: Path, count: int) -> None:
    """img2dataset says in 00000_stats.json how many samples 00000.tar holds."""
    stats = path.with_name(f"{path.stem}_stats.json")
    if not stats.is_file():
        if count == 0:
            raise Damaged("holds no samples")
        return
    try:
        wanted = json.loads(stats.read_text(encoding="utf-8"))["successes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"has a {stats.name} that is no img2dataset statistics file with `successes`: {error!r}") from error
    if wanted != count:
        raise Damaged(f"holds {count} samples, but {stats.name} counted {wanted}: it is cut, or another file")


def _good_headers(path: Path) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """-> each plain member or link, and where its data begin, looking on block by block behind what cannot be read."""
    length, at, said = path.stat().st_size, 0, {}
    with path.open("rb") as file:
        while at + BLOCK <= length:
            file.seek(at)
            try:
                info = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError):
                at, said = at + BLOCK, {}
                continue
            if known := said is not None:
                info.name, info.linkname = (_text(said, *pair) for pair in ((b"path", info.name), (b"linkpath", info.linkname)))
                info.size = int(said.get(b"size", info.size))
            whole = 0 <= info.size and at + BLOCK + info.size <= length
            plain = info.isreg() and info.type != tarfile.GNUTYPE_SPARSE
            if (plain or info.islnk() or info.issym()) and known and whole:
                yield info, at + BLOCK
            changes = whole and info.type in (tarfile.XHDTYPE, *_LONG)
            said = _next_header(info, file.read(info.size), said) if changes else {}
            at += BLOCK + -(-info.size // BLOCK) * BLOCK if whole else BLOCK


def _next_header(info: tarfile.TarInfo, data: bytes, said: dict[bytes, bytes] | None) -> dict[bytes, bytes] | None:
    """What a header and its data set in the one behind it; None where that cannot be known, or where it is sparse."""
    if info.type in _LONG:
        return None if said is None else {**said, _LONG[info.type]: data.rstrip(b"\0")}
    values, at = {}, 0
    while at < len(data):
        record = _PAX.match(data, at)
        end = at + int(record[1]) if record else 0
        if not record or end <= record.end() or data[end - 1 : end] != b"\n":
            return None
        values[record[2]], at = data[record.end() : end - 1], end
    sparse = any(name.startswith(b"GNU.sparse") for name in values)
    return None if sparse or not values.get(b"size", b"0").isdigit() else {**(said or {}), **values}


def _text(said: dict[bytes, bytes], name: bytes, usual: str) -> str:
    """A name that is set in the header before, or the usual one."""
    return said[name].decode("utf-8", "surrogateescape") if name in said else usual
