"""Weights in files, which are read without running code, and their hashes."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.content import file_content, remembered
from ldm.files.pointer import instead_of

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Where a training's checkpoint has its weights, the first that is there; averages before what is trained.
NESTS = ("state_dict", "ema", "model_ema", "params_ema", "model", "model_state_dict", "module", "params", "net")
# Where an embedding of A1111's has a word's rows, and an IP-Adapter its two halves.
INNER = ("string_to_param", "image_proj", "ip_adapter")
# What DDP, torch.compile, FSDP and recomputation put into the names of what they wrap.
WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Inert:
    """Stands in for a class that an old checkpoint names, such as a callback; it holds nothing and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class Entries(dict[str, Any]):
    """Stands in for torch's ParameterDict in embeddings that were saved before torch 1.12; it keeps the entries."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state.get("_parameters", {}))


def _without_factory(*_: object) -> dict[Any, Any]:
    """Stands in for `collections.defaultdict`."""
    return {}


# sd-v1-4.ckpt names Lightning's callback as a key, DiT's training keeps its arguments, others the settings and paths of their
# run; anything else that is no tensor or plain container stays refused.
INERT = """
pytorch_lightning.callbacks.ModelCheckpoint pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
pytorch_lightning.callbacks.early_stopping.EarlyStopping argparse.Namespace types.SimpleNamespace
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.ContainerMetadata
omegaconf.base.Metadata omegaconf.nodes.AnyNode omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode
omegaconf.nodes.StringNode omegaconf.nodes.BooleanNode typing.Any pathlib.PosixPath pathlib.WindowsPath
pathlib._local.PosixPath pathlib._local.WindowsPath datetime.datetime datetime.timedelta
"""
STUBS: list[Any] = [(Inert, name) for name in INERT.split()]
STUBS += [(dict, "pytorch_lightning.utilities.parsing.AttributeDict"), (_without_factory, "collections.defaultdict")]
STUBS += [(Entries, "torch.nn.modules.container.ParameterDict")]
STUBS += [(kind, f"builtins.{kind.__name__}") for kind in (int, float, str, bool, list, dict)]
# Numbers that training noted beside the weights, such as a loss or a generator's state: data, and no code.
STUBS += [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
STUBS += [(np._core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
STUBS += [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd")]


def read_weights(path: Path, sha256: str | None = None, option: str = "", instead: str = "") -> dict[str, Tensor]:
    """A file of safetensors, or a pickle of tensors, also from before torch 1.6 -> tensors by name.

    They are mapped into memory where the file allows it: load them into a network (which copies), or clone them. Whatever a
    checkpoint holds besides weights is left out, and so are prefixes of wrappers such as DDP in the names.

    Args:
        path: the file.
        sha256: the one that the file must have, in hex, or its beginning; it is checked before anything is read.
        option: the setting to name in errors, such as `loss.weights`.
        instead: what to do about an error, a sentence.

    Raises:
        NotFound: there is no such file. Refusal: its sha256 is another; it is damaged, holds code, or holds no weights.
    """
    name, instead = f"{option}={path}" if option else str(path), f" {instead}" if instead else ""
    if not path.is_file():
        raise NotFound(f"{name}: there is no such file.{instead}")
    if path.suffix != ".safetensors" and path.suffix not in PICKLES:
        raise Refusal(f"{name} is none of .safetensors, {', '.join(PICKLES)}.{instead}")
    if sha256 is not None and not (actual := file_content(path)).startswith(sha256.lower()):
        raise Refusal(f"{name} has sha256 {actual}, not {sha256}: it is damaged, or another network with other numbers.{instead}")
    weights = load_tensors(path) if path.suffix == ".safetensors" else _unpickle(path, name, instead)
    bare = {WRAPPERS.sub("", tensor): x for tensor, x in weights.items()}
    if len(bare) < len(weights):
        raise Refusal(f"{name} holds tensors with and without their wrappers' names, such as {sorted(weights)[:2]}.{instead}")
    return bare


def metadata_of(path: Path) -> dict[str, str]:
    """-> the metadata in a safetensors file's header, by key; nothing of any other file.

    Raises:
        Refusal: the file is cut off or no safetensors.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as held:
            return dict(held.metadata() or {})
    except SafetensorError as error:
        raise _not_whole(path, error) from error


def notes_of(path: Path) -> dict[str, str]:
    """-> the text that a small file holds beside its tensors, by key: a safetensors file's metadata, or a pickle's strings."""
    if path.suffix not in PICKLES:
        return metadata_of(path)
    held = _loaded(path, str(path), "")
    return {k: v for k, v in held.items() if isinstance(k, str) and isinstance(v, str)} if isinstance(held, dict) else {}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file -> tensors by name.

    Raises:
        Refusal: the file is cut off or no safetensors.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> Refusal:
    return Refusal(f"{path} is not a whole safetensors file ({error}).{instead_of(path) or ' Export or copy it again.'}")


def download(url: str, sha256: str | None = None, instead: str = "") -> dict[str, Tensor]:
    """Published weights, fetched once into torch's hub folder -> tensors by name.

    Args:
        url: of the file.
        sha256: the one that the file must have whenever it is read; by default the digits at the end of its name, which in
            torchvision's files begin the hash (`vgg16-397923af.pth`).
        instead: what to do without a network, a sentence for errors.

    Raises:
        Unreachable: it could not be fetched. Refusal: it is damaged.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    sha256 = sha256 or (digits and digits[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (URLError, OSError, RuntimeError) as error:  # RuntimeError: what came has another sha256
            raise Unreachable(f"{url} could not be downloaded ({error}). Copy it to {path}. {instead}") from error
    return read_weights(path, sha256, instead=f"Remove it, and {url} is fetched again.")


def weights_hash(module: nn.Module, still: Sequence[str] = ()) -> str:
    """-> sha256, in hex, over the names, shapes and float32 numbers of a module's parameters and buffers, so that the same
    network has the same hash in any precision, wherever it was loaded from.

    `still` names parts whose numbers never change; the first of them, in alphabetical order, are hashed once.
    """
    tensors = sorted(module.state_dict().items())
    origin = _ORIGINS.get(module)
    if origin is not None and origin[1] == _versions(module):  # as it was loaded
        words = [f"{name} {tuple(x.shape)} {x.dtype}" for name, x in tensors]
        return remembered(origin[0], words, lambda: _digest(tensors).hexdigest())
    ends = (i for i, (name, _) in enumerate(tensors) if not any(f"{name}.".startswith(f"{part}.") for part in still))
    head = next(ends, len(tensors))
    if head and _HEADS.get(module, (0, None))[0] != head:
        _HEADS[module] = head, _digest(tensors[:head])
    begun = _HEADS[module][1].copy() if head else None
    return _digest(tensors[head:], begun).hexdigest()


def came_from(module: nn.Module, files: Sequence[Path]) -> None:
    """Records the files that a module's weights were loaded from; its hash is kept in the cache as long as neither changes."""
    if files:
        _ORIGINS[module] = tuple(files), _versions(module)


def loaded_from(module: nn.Module) -> tuple[Path, ...]:
    """-> the files that `came_from` recorded for a module; none where it did not."""
    return _ORIGINS.get(module, ((), []))[0]


_ORIGINS: WeakKeyDictionary[nn.Module, tuple[tuple[Path, ...], list]] = WeakKeyDictionary()
_HEADS: WeakKeyDictionary[nn.Module, tuple[int, Any]] = WeakKeyDictionary()


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """-> the identity of each tensor of a module, and how often it was written to."""
    return [(id(x), x._version) for x in (*module.parameters(), *module.buffers())]


def _digest(tensors: Sequence[tuple[str, Tensor]], begun: Any = None) -> Any:
    digest = hashlib.sha256() if begun is None else begun
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().flatten().numpy())
    return digest


def _loaded(path: Path, name: str, instead: str) -> Any:
    try:
        with torch.serialization.safe_globals(STUBS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what damaged bytes may raise has no end
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = f"it names {code[1]}" if code else type(error).__name__
        what = instead_of(path) or f" It is damaged, or holds code.{instead}"
        raise Refusal(f"{name} does not load as plain tensors ({reason}).{what}") from error


def _unpickle(path: Path, name: str, instead: str) -> dict[str, Tensor]:
    held = _loaded(path, name, instead)
    kind = type(held).__name__
    while isinstance(held, dict) and (inner := next((n for n in NESTS if isinstance(held.get(n), dict)), None)) is not None:
        held = held[inner]
    parts = [part for part in INNER if isinstance(held, dict) and isinstance(held.get(part), dict)]
    if parts:
        held = {f"{part}.{inner}": x for part in parts for inner, x in held[part].items()}
    weights = {n: x for n, x in held.items() if isinstance(n, str) and isinstance(x, Tensor)} if isinstance(held, dict) else {}
    if not weights:
        raise Refusal(f"{name} holds a {kind} and no tensors by name: it is no model's weights.{instead}")
    return weights
