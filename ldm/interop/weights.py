"""Weights out of strangers' files: never running code, and saying what a file is where it is not what was wanted."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import NotFound, Refusal
from ldm.files.folder import load_tensors, read_json

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
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


class Inert:
    """Stands for a class that an old checkpoint names, such as a callback; holds nothing and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# sd-v1-4.ckpt names Lightning's callback as a key, DiT's training keeps its arguments; anything else that is no tensor or
# plain container stays refused.
STUBS = [(Inert, f"pytorch_lightning.callbacks.{place}ModelCheckpoint") for place in ("model_checkpoint.", "")]
STUBS += [(Inert, "argparse.Namespace")]
# Numbers that training noted beside the weights, such as a loss: data, and no code.
STUBS += [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
STUBS += [np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd")]


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle of tensors, mapped into memory and not read yet.

    Raises:
        NotFound: nothing is there. Refusal: the file is damaged, holds code, or is no model.
    """
    if not path.is_file():
        raise NotFound(f"There is no file {path}.")
    if path.suffix == ".json" and ".index." in path.name:
        weights = _joined(path)
    elif path.suffix == ".safetensors":
        weights = load_tensors(path)
    elif path.suffix in PICKLES:
        weights = _unpickle(path)
    else:
        raise Refusal(f"{path} is none of .safetensors, {', '.join(PICKLES)}.")
    lora = [name for name in weights if any(word in name for word in LORA)]
    if lora:
        raise Refusal(f"{path} is a LoRA ({lora[0]}), an addition to a model and no model. Merge it into its base first.")
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
            raise Refusal(
                f"{path}: {name} is {kind}, quantised numbers. Take the float32, bfloat16 or float16 file of this model; from one "
                "in nf4 or int8 diffusers makes it: load it there, dequantize(), save_pretrained. fp8 files lost what it takes."
            )


def _joined(path: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which lie beside it."""
    places = read_config(path)["weight_map"]
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        weights |= open_weights(path.parent / Path(name).name)
    if lacking := sorted(places.keys() - weights.keys()):
        raise Refusal(f"{path} tells of {len(lacking)} tensors that its files lack, such as {', '.join(lacking[:3])}.")
    return weights


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(STUBS):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {code[1]}" if code else type(error).__name__
        raise Refusal(f"{path} does not load as plain tensors ({reason}). It is damaged, or holds code.") from error
    held = held.get("state_dict", held.get("ema", held.get("model", held))) if isinstance(held, dict) else held
    weights = {n: x for n, x in held.items() if isinstance(n, str) and isinstance(x, Tensor)} if isinstance(held, dict) else {}
    if not weights:
        raise Refusal(f"{path} holds a {type(held).__name__} and no tensors by name: it is no model's weights.")
    return weights
