"""Models of other layouts, and those of the hub, brought into our layout once: folders, named by what they were made from.

An entry is a folder `models/KEY` of the cache, whole or not there, with `brought.json`: what it was made from, under which names.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.cache import cache_folder
from ldm.files.content import digest_of, file_content, files_content
from ldm.files.folder import read_json, write_json
from ldm.files.process import first
from ldm.files.whole import remove_halves, whole_folder
from ldm.interop.hub import HUB, download
from ldm.interop.published import Published, published

CONVERSION = 1  # counts up when conversion writes another thing of the same source: what was brought before is made again
NOTE = "brought.json"
READ = (".json", ".txt", ".yaml", ".model", ".safetensors", ".bin", ".ckpt", ".pt", ".pth")  # of a folder, what may be read
Say = Callable[[str], None]


def home() -> Path:
    """Where the models are."""
    return cache_folder() / "models"


def is_foreign(path: Path) -> bool:
    """Whether a file or folder that is there is in another layout than ours, as far as a look at its names and config tells."""
    if path.is_file():
        return True
    config = path / "config.json"
    return (path / "model_index.json").is_file() or (config.is_file() and "_class_name" in read_json(config))


def is_named(source: str) -> bool:
    """Whether it is on the hub, or a published model's short name."""
    return source.startswith(HUB) or source in published()


def say_first(line: str) -> None:
    """Prints on the first process."""
    if first():
        print(line, flush=True)


def brought(source: str, say: Say = say_first) -> Path:
    """A file or folder in any layout, hf://org/name, hf://org/name/FILE or a short name -> the folder of the same model in ours.

    Raises:
        NotFound: nothing is there. Refusal: it is in no layout that is known, is damaged, or is not what it says.
        Unreachable: the hub does not give it.
    """
    known = _known(source)
    if known is not None:
        return known
    row = published().get(source)
    path = _fetched(source, row, say)
    if path.is_dir() and (path / "config.json").is_file() and not is_foreign(path):
        return path  # of our own layout, on the hub
    key = _key(path, source, row, say)
    folder = home() / key
    home().mkdir(parents=True, exist_ok=True)
    with FileLock(home() / f".{key}.lock"):
        if not (folder / NOTE).is_file():
            remove_halves(home(), key)
            _convert(path, source, row, folder, say)
        note = read_json(folder / NOTE)
        places = {**note["places"], source if is_named(source) else str(path.absolute()): _looks(path)}
        write_json({**note, "places": places}, folder / NOTE)
    return folder


def entries() -> Iterator[tuple[Path, dict[str, Any], int]]:
    """-> each model of the cache, its note, and how many bytes it takes; the newest last."""
    notes = [(folder, read_json(folder / NOTE)) for folder in home().glob("[!.]*") if (folder / NOTE).is_file()]
    for folder, note in sorted(notes, key=lambda entry: str(entry[1].get("made"))):
        yield folder, note, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def clear(names: Sequence[str]) -> list[Path]:
    """Removes the models that are called so, by key or by what they were made from, or all; and what was left half written.

    Raises:
        NotFound: there is none of that name.
    """
    there = list(entries())
    chosen = {name: [folder for folder, note, _ in there if _is_called(name, folder, note)] for name in names}
    if missing := [name for name, found in chosen.items() if not found]:
        raise NotFound(f"There is no {missing[0]} in {home()}; `ldm cache` lists what there is.")
    gone = list(dict.fromkeys(folder for found in chosen.values() for folder in found)) if names else [f for f, _, _ in there]
    for folder in gone:
        shutil.rmtree(folder)
    remove_halves(home(), "")
    return gone


def _is_called(name: str, folder: Path, note: dict[str, Any]) -> bool:
    return name == folder.name or name in note["places"] or str(Path(name).absolute()) in note["places"]


def _known(source: str) -> Path | None:
    """The entry that was made from this, where that has not changed since; of what is on the hub whatever was brought first."""
    named = is_named(source)
    place = source if named else str(Path(source).absolute())
    for folder, note, _ in entries():
        if note["conversion"] == CONVERSION and place in note["places"]:
            if named or note["places"][place] == _looks(Path(source)):
                return folder
    return None


def _fetched(source: str, row: Published | None, say: Say) -> Path:
    """The files themselves, from the hub where they are not here."""
    if not is_named(source):
        if not Path(source).exists():
            raise NotFound(f"There is nothing at {source}.")
        return Path(source)
    if row is None:
        return download(source)
    say(f"{source}: {row.source} (licence: {row.licence})")
    try:
        return download(row.source)
    except Unreachable:
        if row.mirror is None:
            raise
        say(f"{row.source} is not had; trying {row.mirror}")
        return download(row.mirror)


def _key(path: Path, source: str, row: Published | None, say: Say) -> str:
    """What an entry is called: by all that it is made from."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in READ)
        held = [files_content(files, path)]
    else:
        say(f"{path}: looking whether it is known ({path.stat().st_size / 1e9:.1f} GB)")
        held = [file_content(path)]
        if row is not None and row.sha256 not in (None, held[0]):
            raise Refusal(f"{path} has sha256 {held[0]}, and {source} has {row.sha256}: remove it, and it is fetched again.")
        beside = path.with_suffix(".yaml")
        held += [file_content(beside)] if beside.is_file() else []
    said = [] if row is None else [json.dumps([row.licence, row.usual], sort_keys=True, default=str)]
    return digest_of([str(CONVERSION), *held, *said])[:16]


def _convert(path: Path, source: str, row: Published | None, folder: Path, say: Say) -> None:
    """Reads a model in any layout, and writes it in ours."""
    from ldm.interop.convert import check, describe, read, write
    from ldm.interop.usual import usual_of

    say(f"{source} is brought into the layout of ldm, once, into {folder}")
    begun = time.time()
    try:
        bundle, layout = read(str(path))
        check(bundle, source, None)
        if bundle.recipe is not None:
            bundle.recipe["usual"] = {**usual_of(bundle, path), **(row.usual if row else {})}
        say(describe(bundle))
        with whole_folder(folder) as part:
            write(bundle, part, "ldm", row.licence if row else "unknown", source)
            made = {"made": time.strftime("%Y-%m-%dT%H:%M:%S"), "licence": row.licence if row else "unknown"}
            write_json({"conversion": CONVERSION, "layout": layout, "places": {}, **made}, part / NOTE)
    except NotFound:
        raise
    except Refusal as error:
        if (kind := _adapter(path)) is not None:
            raise Refusal(f"{source} is {kind}, and no model: model=BASE adapters={source} puts it on one.") from error
        what = f"{error} What a source leaves open is said to `ldm convert {path} FOLDER --to ldm ...`; then model=FOLDER."
        raise Refusal(what if "--" in str(error) else str(error)) from error
    say(f"{source} is there, after {time.time() - begun:.0f} s")


def _adapter(path: Path) -> str | None:
    """What kind of adapter lies there, if any."""
    from ldm.interop.find import adapter_kinds
    from ldm.interop.foreign import Foreign

    try:
        found = Foreign(path)
        return next((kind.word for kind in adapter_kinds() if kind.recognise(found)), None)
    except Refusal:
        return None


def _looks(path: Path) -> list[list[Any]]:
    """Names, sizes and times of what a file or folder holds: whether it has changed, without reading it."""
    files = [path, path.with_suffix(".yaml")] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in READ)
    there = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file.relative_to(path.parent)), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in there]
