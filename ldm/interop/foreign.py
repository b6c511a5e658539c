"""An adapter's file or folder that is being read: its tensors, what is said beside them, and which of them were used."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

from torch import Tensor

from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.content import file_content, files_content
from ldm.files.folder import read_json
from ldm.files.weights import PICKLES, notes_of, read_weights
from ldm.interop.hub import HUB, download, repository

ENDINGS = (".safetensors", *PICKLES)


class Foreign:
    """A file of tensors, or a folder with such files in it; `origin` is its address on the hub, if it is from there.

    Raises:
        NotFound: nothing is there. Refusal: there are no tensors in it.
    """

    def __init__(self, path: Path, origin: str | None = None) -> None:
        if not path.exists():
            raise NotFound(f"adapters={path}: there is nothing there; name a run, a folder or a file ({', '.join(ENDINGS)}).")
        self.path, self.origin = path, origin
        self.files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in ENDINGS)
        stems = {f.stem for f in self.files if f.suffix == ".safetensors"}
        self.files = [f for f in self.files if f.suffix == ".safetensors" or f.stem not in stems]  # the same, older
        if not self.files:
            raise Refusal(f"adapters={path}: there are no weights in this folder ({', '.join(ENDINGS)}).")

    @cached_property
    def each(self) -> dict[Path, dict[str, Tensor]]:
        """The tensors of each of its files by name."""
        return {file: read_weights(file) for file in self.files}

    @cached_property
    def names(self) -> set[str]:
        """Of the tensors of all its files."""
        return {name for held in self.each.values() for name in held}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The tensors of all its files by name.

        Raises:
            Refusal: two files hold the same.
        """
        found: dict[str, Tensor] = {}
        for held in self.each.values():
            if twice := next((name for name in held if name in found), None):
                raise Refusal(f"adapters={self.path}: {twice} is in several of {[f.name for f in self.files]}; name one file.")
            found |= held
        return found

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What its first file says beside its tensors."""
        return notes_of(self.files[0])

    def config(self, name: str) -> dict[str, Any]:
        """What a JSON file of its folder says; nothing where there is none."""
        path = self.path / name
        return dict(read_json(path)) if self.path.is_dir() and path.is_file() else {}

    def said(self, name: str) -> dict[str, Any]:
        """What its metadata say as JSON under a name; nothing where they do not.

        Raises:
            Refusal: it is no JSON.
        """
        try:
            return dict(json.loads(self.metadata.get(name, "{}")))
        except ValueError as error:
            raise Refusal(f"{self.path}: its metadata {name} are no JSON ({error}).") from error

    def beside(self, place: str, names: Sequence[str]) -> Path | None:
        """A folder, named from the one where it lies, with these files in it, which are fetched where it is from the hub; None
        where there is none."""
        if self.origin is None:
            folder = (self.path if self.path.is_dir() else self.path.parent) / place
            return folder if all((folder / name).is_file() for name in names) else None
        name, file = repository(self.origin)
        inside = normpath(join(dirname(file), place))
        if inside.startswith(".."):
            return None
        try:
            return [download(f"{HUB}{name}/{inside}/{each}") for each in names][-1].parent
        except Unreachable:
            return None

    def sha256(self) -> str:
        """Of the file, or of the folder's files."""
        return file_content(self.path) if self.path.is_file() else files_content(self.files, self.path)
