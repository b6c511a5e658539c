"""Weights out of strangers' files: never running code, and saying what a file is where it is not what was wanted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import read_json
from ldm.files.pieces import read_pieces

# What to do about quantised numbers.
WHOLE = (
    "Take the float32, bfloat16 or float16 file of this model; of one in nf4, int8 or GGUF diffusers makes it: load it there, "
    "dequantize(), save_pretrained. fp8 files lost what it takes."
)
LORA = ("lora_", "_lora.", ".lora.", "hada_w1", "lokr_w1")


class Config(dict[str, Any]):
    """The settings in a JSON or YAML file; one that is not there names itself and the file.

    Raises:
        Refusal: the file holds something else.
    """

    def __init__(self, held: Any, path: Path) -> None:
        if not isinstance(held, dict):
            raise Refusal(f"{path} holds a {type(held).__name__}; settings by name were wanted.")
        super().__init__(held)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise Refusal(f"{self.path} does not say {name!r}.")


def read_config(path: Path) -> Config:
    """The settings in a JSON file.

    Raises:
        NotFound: nothing is there. Refusal: it is damaged, or holds something else.
    """
    return Config(read_json(path), path)


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class that a model_index.json names for a part, which counts before the one that the part's own config names."""
    named = index.get(part)
    return named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else None


def open_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name: those of one file, or of all files that an index beside them names.

    Raises:
        NotFound: nothing is there. Refusal: it is of no kind that is known, damaged, holds code, or holds no whole model.
    """
    if path.suffix == ".gguf":
        raise Refusal(f"{path} is GGUF, quantised numbers. {WHOLE}")
    weights = read_pieces(path)
    lora = [name for name in weights if any(word in name for word in LORA)]
    if lora:
        raise Refusal(f"{path} is a LoRA ({lora[0]}), an addition to a model and no model: it is put on one by adapters={path}.")
    return weights


def check_numbers(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError where a tensor holds NaN or infinity, as models saved in half precision sometimes do, or is quantised."""
    check_kinds(weights, path)
    for name, x in weights.items():
        kind = str(x.dtype).removeprefix("torch.")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise Refusal(f"{path}: {name} ({kind}) holds numbers that are not finite. Take the float32 file of this model.")


def check_kinds(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError where a tensor is quantised, as in files in fp8, int8 or nf4; nothing is read."""
    for name, x in weights.items():
        kind = str(x.dtype).removeprefix("torch.")
        if x.dtype.itemsize == 1 and x.dtype != torch.bool:
            raise Refusal(f"{path}: {name} is {kind}, quantised numbers. {WHOLE}")
