"""The weights of a model in a folder, as transformers and diffusers write them: one file, or several that an index names.

Of several variants the best is read: full precision, which both take where none is asked for, then float16, which keeps three
bits more of a weight than bfloat16, then bfloat16, then any other, such as `non_ema`; of one variant safetensors before pickles.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.errors import NotFound, Refusal
from ldm.files.folder import read_json
from ldm.files.weights import read_weights

KINDS = ("", "fp32", "fp16", "bf16")  # variants of a model's files, the best first
STEM = "model"  # of a text model's files; diffusers' parts have `diffusion_pytorch_model`


def best(names: Sequence[str], stem: str = STEM) -> str | None:
    """-> of the names of a folder's files the weights that are read, or the index of their pieces; None where there are none."""
    pattern = re.compile(rf"(?:{stem}|pytorch_model)(?:\.(\w+))?\.(safetensors|bin)(?:\.index(?:\.(\w+))?\.json)?")
    files = []
    for match in filter(None, map(pattern.fullmatch, names)):
        kind = match[1] or match[3] or ""
        files.append((KINDS.index(kind) if kind in KINDS else len(KINDS), match[2] != "safetensors", match[0]))
    return min(files)[2] if files else None


def best_in(folder: Path, stem: str = STEM) -> Path:
    """-> the same of a folder, with its path.

    Raises:
        NotFound: there are none.
    """
    name = best([path.name for path in folder.iterdir()] if folder.is_dir() else [], stem)
    if name is None:
        raise NotFound(f"There are no weights in {folder}: wanted {stem}.safetensors, or an index of its pieces beside them.")
    return folder / name


def patterns_of(names: Sequence[str]) -> list[str]:
    """The names of a folder's files -> patterns of those that `read_folder` would read."""
    file = best(names)
    if file is None or not file.endswith(".json"):
        return [] if file is None else [file]
    stem, end, _, *kind, _ = file.split(".")
    return [file, *dict.fromkeys((f"{'.'.join([stem, *kind])}-*.{end}", f"{stem}-*.{'.'.join([*kind, end])}"))]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """-> the tensors of the model in a folder by name, mapped into memory where the files allow it.

    Raises:
        NotFound: there are none. Refusal: a file is missing or damaged, or its numbers are quantised.
    """
    path = best_in(folder)
    weights = read_pieces(path)
    for name, x in weights.items():
        if x.dtype.itemsize == 1:
            kind = str(x.dtype).removeprefix("torch.")
            raise Refusal(
                f"{path}: {name} is {kind}, quantised numbers. Take the bfloat16, float16 or float32 files of this model."
            )
    return weights


def read_pieces(path: Path) -> dict[str, Tensor]:
    """-> the tensors of a file, or of all files that an index (.json) names, which lie beside it.

    Raises:
        NotFound: a file is missing. Refusal: one is damaged, or lacks a tensor that the index names; the index is none.
    """
    if path.suffix != ".json":
        return read_weights(path)
    index, weights = read_json(path), {}
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise Refusal(f"{path} names no files of weights (weight_map). Of a pipeline name its folder, {path.parent}.")
    for name in sorted(set(places.values())):
        weights |= read_weights(path.parent / Path(name).name)
    if lacking := sorted(places.keys() - weights.keys()):
        raise Refusal(f"{path} tells of {len(lacking)} tensors that its files lack, such as {', '.join(lacking[:3])}.")
    return weights
