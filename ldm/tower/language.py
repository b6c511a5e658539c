"""Frozen language models as text towers, by name or from a folder: T5 (tower/t5.py), and any encoder of transformers."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.folder import LOCAL, is_part, read_json
from ldm.files.pieces import patterns_of, read_folder
from ldm.files.weights import came_from
from ldm.nn.empty import is_planned, weighted, weightless
from ldm.tower.t5 import COMMON, SIZES, build_t5, encoder_of
from ldm.tower.words import Words

SETTINGS = ("*.json", "*.model", "*.txt")  # of a repository, what is no weights; never code


def load_language(model: str, pretrained: bool, dtype: torch.dtype, option: str) -> nn.Module:
    """A frozen tower, `T5` or `Peer`, with its `width`, D, and `depth`, the number of its blocks.

    Args:
        model: a folder, or a repository of the Hugging Face hub: org/name, or org/name/FOLDER.
        pretrained: whether its weights are loaded; without them only its sizes are right, and a published T5 needs no file.
        dtype: of its weights.
        option: the setting to name in errors, such as `condition.t5`.

    Raises:
        NotFound: there is no such folder. Unreachable: the hub cannot be reached. Refusal: the files are of another model, or a
            package is missing.
    """
    pretrained = pretrained and not is_planned()
    if not pretrained and model in SIZES:
        return _frozen(build_t5(COMMON | SIZES[model], model), dtype)
    folder = folder_of(model, f"{option}.model")
    config = read_json(folder / "config.json")
    if not is_t5(config):
        with weighted():
            return _frozen(Peer(_transformers_model(folder, pretrained, dtype, option)), dtype, folder if pretrained else None)
    with weightless():
        tower = build_t5(config, str(folder / "config.json"))
    if not pretrained:
        return _frozen(tower if is_planned() else tower.to_empty(device=torch.get_default_device()), dtype)
    weights = encoder_of(read_folder(folder))
    shapes, given = ({name: x.shape for name, x in held.items()} for held in (tower.state_dict(), weights))
    if wrong := sorted({name for name, _ in shapes.items() ^ given.items()}):
        raise Refusal(f"{option}.model={model}: its weights do not fit its config.json: {', '.join(wrong[:3])}.")
    with weighted():
        tower.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, assign=True)
    return _frozen(tower, dtype, folder)


def load_words(model: str, option: str, published: bool) -> Any:
    """The tokenizer of a folder or a repository: `Words` with `published`, which says that it is a T5's, or else `PeerWords`.

    Raises:
        Refusal: as `load_language`.
    """
    folder = folder_of(model, f"{option}.tokenizer")
    return Words(folder, option) if published else PeerWords(folder, option)


def is_t5(config: Mapping[str, Any]) -> bool:
    """Whether a config of transformers is that of a T5 v1.1, which tower/t5.py implements."""
    return config.get("model_type") == "t5" and config.get("feed_forward_proj") == "gated-gelu"


def folder_of(model: str, option: str) -> Path:
    """A folder -> itself; a repository of the hub -> the folder with the files of it that are read, which are fetched once.

    Raises:
        NotFound: there is no such folder. Unreachable: the hub cannot be reached, and they were not fetched before.
    """
    folder = Path(model.removeprefix(LOCAL))
    if folder.is_dir():
        return folder
    org, _, rest = model.partition("/")
    name, _, inside = rest.partition("/")
    if model.startswith((LOCAL, "/", ".")) or not name or model.endswith("/"):
        raise NotFound(f"{option}={model}: there is no such folder. Name one, or a repository of the Hugging Face hub, org/name.")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # what a connection that fails raises, where it is no OSError

    repository, begin = f"{org}/{name}", f"{inside}/" if inside else ""
    try:
        there = [f.removeprefix(begin) for f in HfApi().list_repo_files(repository) if f.startswith(begin)]
        wanted = [begin + pattern for pattern in (*SETTINGS, *patterns_of(there))]
        return Path(snapshot_download(repository, allow_patterns=wanted)) / inside
    except (OSError, HTTPError) as error:  # offline: what was fetched before
        try:
            return Path(snapshot_download(repository, local_files_only=True)) / inside
        except OSError:
            raise Unreachable(
                f"{option}={model} is no folder here, and could not be fetched from the hub: {' '.join(str(error).split())}"
            ) from error


class Peer(nn.Module):
    """A model of transformers as a tower: an encoder, the encoder of an encoder-decoder, or a decoder's hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            states = self.eval()(torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device))
        self.width, self.depth = states[-1].shape[2], len(states) - 1

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Sequence[Tensor]:
        """As `T5.forward`: ids (B, L), mask (B, L) bool -> depth + 1 hidden states, (B, L, D) each."""
        mask = torch.ones_like(ids) if mask is None else mask.long()
        return self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states


class PeerWords:
    """The tokenizer of a model of transformers, with the members of `Words`.

    Raises:
        Refusal: transformers reads no tokenizer from the folder, or a package is missing.
    """

    def __init__(self, folder: Path, option: str) -> None:
        transformers = _transformers(option)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # what others' code may raise has no end
            said = " ".join(str(error).split())
            pip = " Install it: pip install sentencepiece protobuf." if "sentencepiece" in said.lower() else ""
            raise Refusal(f"{option}: {folder} holds no tokenizer that transformers reads ({said[:200]}).{pip}") from error
        self.padding = self.tokenizer.pad_token_id or 0  # which is never read: it is masked

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """-> the ids of each caption, not truncated, with the begin and end tokens that the model has."""
        return self.tokenizer(list(captions)).input_ids

    def cut(self, caption: str, length: int) -> list[int]:
        """-> the ids of a caption, truncated to `length`, begin and end tokens included."""
        return self.tokenizer(caption, truncation=True, max_length=length).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        """-> the text of some ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def truncated(words: Any, caption: str, length: int) -> tuple[int, str]:
    """-> the number of a caption's tokens, and the text of those behind `length`; "" where there are none."""
    (row,) = words.rows([caption])
    if len(row) <= length:
        return len(row), ""
    shared = sum(a == b for a, b in zip(row, words.cut(caption, length)))
    return len(row), words.decode(row[shared:])


def _transformers_model(folder: Path, pretrained: bool, dtype: torch.dtype, option: str) -> nn.Module:
    """The model in a folder; of an encoder-decoder its encoder.

    Raises:
        Refusal: transformers does not read it.
    """
    transformers = _transformers(option)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kinds = (transformers.MODEL_FOR_TEXT_ENCODING_MAPPING, transformers.MODEL_MAPPING)
        made = [kind[type(config)] for kind in kinds if type(config) in kind]
        if not made:  # a part of a pair, saved alone
            beside = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
            made = [vars(beside)[config.architectures[0]]]
        model = _first(made, lambda m: m.from_pretrained(folder, local_files_only=True, dtype=dtype) if pretrained else m(config))
    except Exception as error:  # what others' code may raise has no end
        raise Refusal(f"{option}.model: transformers does not read {folder} ({' '.join(str(error).split())[:300]}).") from error
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _first(made: Sequence[type], make: Callable[[type], nn.Module]) -> nn.Module:
    """`make` of the first class that accepts the config: an encoder's class may refuse that of an encoder-decoder."""
    for kind in made[:-1]:
        try:
            return make(kind)
        except ValueError:
            continue
    return make(made[-1])


def _transformers(option: str) -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise Refusal(
            f"{option} reads a model by transformers, which is missing: pip install 'transformers>=5'. A T5 v1.1 does without."
        ) from error


def _frozen(tower: nn.Module, dtype: torch.dtype, folder: Path | None = None) -> nn.Module:
    tower = tower.to(dtype).eval().requires_grad_(False)
    came_from(tower, [] if folder is None else sorted(filter(is_part, folder.iterdir())))
    return tower
