"""The weights of a model in a folder, as transformers and diffusers write them: one file, or several that an index names."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.errors import NotFound, Refusal
from ldm.files.folder import read_json
from ldm.files.weights import read_weights

KINDS = ("", "fp32", "bf16", "fp16")  # variants of a model's files, the best first


def names_of() -> list[str]:
    """-> the names of such files and indices, in the order in which they are preferred."""
    kinds = [f".{kind}" if kind else "" for kind in KINDS]
    endings = (("model", "safetensors"), ("pytorch_model", "bin"))
    return [n for stem, end in endings for dot in kinds for n in (f"{stem}{dot}.{end}", f"{stem}.{end}.index{dot}.json")]


def patterns_of(names: Sequence[str]) -> list[str]:
    """The names of a folder's files -> patterns of those that `read_folder` would read."""
    best = next((name for name in names_of() if name in names), None)
    if best is None or not best.endswith(".json"):
        return [] if best is None else [best]
    stem, end, _, *kind, _ = best.split(".")
    return [best, f"{'.'.join([stem, *kind])}-*.{end}"]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """-> the tensors of the model in a folder by name, mapped into memory where the files allow it.

    Raises:
        NotFound: there are none. Refusal: a file is missing or damaged, or its numbers are quantised.
    """
    path = next((folder / name for name in names_of() if (folder / name).is_file()), None)
    if path is None:
        raise NotFound(f"There are no weights in {folder}: wanted {names_of()[0]}, or an index of its pieces beside them.")
    weights = read_pieces(path) if path.suffix == ".json" else read_weights(path)
    for name, x in weights.items():
        if x.dtype.itemsize == 1:
            kind = str(x.dtype).removeprefix("torch.")
            raise Refusal(
                f"{path}: {name} is {kind}, quantised numbers. Take the bfloat16, float16 or float32 files of this model."
            )
    return weights


def read_pieces(index: Path) -> dict[str, Tensor]:
    """-> the tensors of all files that an index names, which lie beside it.

    Raises:
        NotFound: a file is missing. Refusal: one is damaged, or lacks a tensor that the index names.
    """
    places, weights = read_json(index)["weight_map"], {}
    for name in sorted(set(places.values())):
        weights |= read_weights(index.parent / Path(name).name)
    if lacking := sorted(places.keys() - weights.keys()):
        raise Refusal(f"{index} tells of {len(lacking)} tensors that its files lack, such as {', '.join(lacking[:3])}.")
    return weights
