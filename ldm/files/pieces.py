"""The weights in a folder as transformers and diffusers write them: one file, or pieces that an index names."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.errors import NotFound, Refusal
from ldm.files.folder import read_json
from ldm.files.weights import read_weights

KINDS = ("", "fp32", "bf16", "fp16")  # of a model's files, the first that is there


def names_of() -> list[str]:
    """What such files are called, the best first: safetensors, and of the most bits, whole or the index of pieces."""
    kinds = [f".{kind}" if kind else "" for kind in KINDS]
    endings = (("model", "safetensors"), ("pytorch_model", "bin"))
    return [n for stem, end in endings for dot in kinds for n in (f"{stem}{dot}.{end}", f"{stem}.{end}.index{dot}.json")]


def patterns_of(names: Sequence[str]) -> list[str]:
    """Of a folder's files those that `read_folder` would read, as patterns."""
    best = next((name for name in names_of() if name in names), None)
    if best is None or not best.endswith(".json"):
        return [] if best is None else [best]
    stem, end, _, *kind, _ = best.split(".")
    return [best, f"{'.'.join([stem, *kind])}-*.{end}"]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model of transformers by name, mapped into memory where the files allow it.

    Raises:
        NotFound: there are none. Refusal: a piece is missing or damaged, or numbers are quantised.
    """
    found = next((folder / name for name in names_of() if (folder / name).is_file()), None)
    if found is None:
        raise NotFound(f"There are no weights in {folder}: wanted {names_of()[0]}, or an index of its pieces beside them.")
    weights = read_pieces(found) if found.suffix == ".json" else read_weights(found)
    for name, x in weights.items():
        if x.dtype.itemsize == 1:
            kind = str(x.dtype).removeprefix("torch.")
            raise Refusal(
                f"{found}: {name} is {kind}, quantised numbers. Take the bfloat16, float16 or float32 files of this model."
            )
    return weights


def read_pieces(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which lie beside it.

    Raises:
        NotFound: a piece is missing. Refusal: one is damaged, or lacks a tensor that the index tells of.
    """
    places, weights = read_json(index)["weight_map"], {}
    for name in sorted(set(places.values())):
        weights |= read_weights(index.parent / Path(name).name)
    if lacking := sorted(places.keys() - weights.keys()):
        raise Refusal(f"{index} tells of {len(lacking)} tensors that its files lack, such as {', '.join(lacking[:3])}.")
    return weights
