"""What a network, a part and a layout must say, so that models travel. A new family is one file in `network/`, a new kind of
model beside it one in `part/`; the layouts, in `layout/`, know folders and prefixes, and no architecture.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.interop.bundle import DISCRETE, VERSION, Bundle, filled, shapes_of
from ldm.interop.foreign import Foreign
from ldm.interop.schedulers import scheduler_config
from ldm.interop.source import File
from ldm.interop.tie import Shapes, Tie
from ldm.types import Widths

Built = tuple[dict[str, Any], int, dict[str, int]]  # how a network is built, its channels, and its widths by slot
Ties = dict[str, Tie]


class Network:
    """A backbone of a family. Those below `with defaults` need no word for a network that is told nothing.

    `target` and `made` are how ours is built; `folder` and `classes` where diffusers keeps it and what it is called there;
    `single` is the layout's word for a single file, `prefix` where its tensors begin in one, and `alone` says that such a
    file holds the network and its tables, and no parts. `shift` is that of its family's latents, z = x / scale + shift;
    `straight` says that it is published for straight paths and says flow.
    """

    name: str
    target: str
    made: Callable[..., torch.nn.Module]
    folder = "unet"
    classes: tuple[str, ...] = ()
    single = "compvis"
    prefix = ""
    alone = False
    shift = 0.0
    straight = False

    def settings_of(self, shapes: Shapes, told: Mapping[str, Any]) -> Built:
        """Their names and shapes in a single file, and what is told beside it -> how it is built."""
        raise NotImplementedError

    def read_config(self, config: Mapping[str, Any]) -> Built:
        """diffusers' config -> how it is built."""
        raise NotImplementedError

    def config(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """How it is built -> diffusers' config."""
        raise NotImplementedError

    def single_ties(self, names: Iterable[str], settings: Mapping[str, Any], prediction: str) -> Ties:
        """Our names -> those of a single file, behind the prefix."""
        raise NotImplementedError

    def diffusers_ties(self, names: Iterable[str], settings: Mapping[str, Any]) -> Ties:
        """Our names -> diffusers'."""
        raise NotImplementedError

    # ---- with defaults

    def builds(self, bundle: Bundle) -> bool:
        """Whether a model is built on it."""
        return bundle.recipe["backbone"]["_target_"] == self.target

    def recognise(self, names: Iterable[str]) -> bool:
        """Whether the tensors of a single file are its."""
        return any(name.startswith(self.prefix) for name in names)

    def shapes(self, channels: int, widths: Mapping[str, int], settings: Mapping[str, Any]) -> Shapes:
        """Names and shapes of such a network, which is not built in memory."""
        with torch.device("meta"):
            return shapes_of(self.made(channels, Widths(**widths), **settings))

    def settings(self, bundle: Bundle) -> dict[str, Any]:
        """How that of a model is built, the defaults filled in."""
        return {k: v for k, v in filled(self.made, bundle.recipe["backbone"]).items() if k != "vector"}

    def node(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Its config."""
        return {"_target_": self.target, "_partial_": True, **settings}

    def channels(self, bundle: Bundle) -> int | None:
        """How many channels the latents that it draws have, where it shows."""
        return None

    def tokens(self, bundle: Bundle) -> int | None:
        """How wide the tokens are that it attends to, where it shows."""
        return None

    def averaged(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a single file, each its average where the file holds averages."""
        return weights

    def check(self, bundle: Bundle, place: str) -> None:
        """Raises ValueError where its tensors are not those of its config."""

    def brought(self, bundle: Bundle) -> Bundle:
        """A model as others tell its network, as ours do."""
        return bundle

    def given(self, bundle: Bundle) -> Bundle:
        """The inverse of `brought`."""
        return bundle

    def check_single(self, bundle: Bundle) -> None:
        """Raises ValueError where a single file has no place for something in a model."""

    def check_diffusers(self, bundle: Bundle) -> None:
        """Raises ValueError where a folder of diffusers has no place for something in a model."""

    def tables(self) -> dict[str, str]:
        """Rows that are trained beside it: our name -> the one in a single file."""
        return {}

    def diffusers_tables(self, config: Mapping[str, Any], built: Built) -> dict[str, tuple[Tie, tuple[int, ...]]]:
        """The same at diffusers: our name -> how it stands there, and its shape."""
        return {}

    def diffusers_rows(self, bundle: Bundle) -> dict[str, Tensor]:
        """The same, as diffusers has them, by our name."""
        return {}

    def check_folder(self, folder: Path) -> None:
        """Raises ValueError where what else lies in a folder of diffusers is not what it is told."""

    def beside_folder(self, bundle: Bundle) -> dict[str, dict[str, Any]]:
        """What else lies in a folder of diffusers: settings by their file."""
        return {}

    def computed(self, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of ours that diffusers computes."""
        return {}

    def today(self, name: str) -> str:
        """What a tensor that an older diffusers named is called now."""
        return name

    left: tuple[str, ...] = ()  # names that are left in single files
    diffusers_left: tuple[str, ...] = ()

    def conditions(self, bundle: Bundle, built: Built, config: Mapping[str, Any] | None, index: Mapping[str, Any]) -> None:
        """Adds what else it is told to a model's conditions: of a single file without a config, or of diffusers' with it."""

    def scale(self, file: File) -> float:
        """The scale factor of the latents of its family."""
        return 0.18215

    def says(self, file: File, bundle: Bundle, built: Built, prediction: str | None) -> str:
        """What that of a single file says; `prediction` is what the caller says."""
        return prediction or file.prediction() or "Noise"

    def schedule(self, file: File | None, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The schedule of a single file, and how the network is told the noise level."""
        return file.schedule(), dict(DISCRETE)

    def assumed(self, file: File, bundle: Bundle, prediction: str | None) -> list[str]:
        """What nothing in a single file says of it."""
        return []

    def beside(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """What the yaml beside a single file says of it."""
        return {}

    def scheduler(self, bundle: Bundle) -> dict[str, Any]:
        """The config of diffusers' scheduler that a model on it is drawn with.

        Raises:
            Refusal: none has its schedule or what it says.
        """
        return scheduler_config(bundle.recipe)

    def pipeline(self, bundle: Bundle) -> dict[str, Any]:
        """The model_index.json of the pipeline that draws from a model on it."""
        index = {"_class_name": "DiffusionPipeline", "_diffusers_version": VERSION, self.folder: ["diffusers", self.classes[0]]}
        return {**index, "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}

    def describe(self, bundle: Bundle) -> str:
        """What was recognised, in a line."""
        return f"{self.name:12s} {sum(x.numel() for x in bundle.backbone().values()):,} parameters"


class Part:
    """A model beside the network: an autoencoder, a text tower. Each method takes what it knows, and leaves the rest."""

    kind: str
    word: str  # for what was recognised
    folders: tuple[str, ...] = ()  # of diffusers' folders
    alone = False  # whether it is a model by itself
    classes: tuple[str, ...] = ()  # of diffusers, which are it by itself

    def take_file(self, file: File, bundle: Bundle, scale: float) -> None:
        """From a single file."""

    def give_file(self, bundle: Bundle) -> dict[str, Tensor]:
        """For a single file."""
        return {}

    def beside(self, bundle: Bundle) -> dict[str, Any]:
        """What the yaml beside a single file says of it."""
        return {}

    def take_folder(self, folder: Path, index: Mapping[str, Any], bundle: Bundle) -> None:
        """From a folder of diffusers."""

    def give_folder(self, bundle: Bundle, folder: Path, index: Mapping[str, Any]) -> None:
        """For a folder of diffusers."""

    def take_ours(self, bundle: Bundle, folder: Path) -> None:
        """From a folder of ours, whose recipe is read."""

    def give_ours(self, bundle: Bundle, folder: Path) -> None:
        """For a folder of ours."""

    def check_folder(self, bundle: Bundle) -> None:
        """Raises ValueError where a folder of diffusers has no place for it."""

    def check(self, bundle: Bundle, source: str) -> None:
        """Raises ValueError where something of it is missing."""

    def add_words(self, bundle: Bundle, folder: Path) -> bool:
        """Gives it the tokenizer in a folder; whether it is one that takes it."""
        return False

    def prefix(self, bundle: Bundle) -> str | None:
        """Where its weights begin among ours, if it was trained with the network."""
        return None

    def tokens(self, bundle: Bundle) -> dict[str, int]:
        """How wide the tokens are that it makes, by the condition's name."""
        return {}


@dataclass(frozen=True)
class Read:
    """An adapter that was read: the config of its member in ldm/adapter, its tensors by the model's names, and what is told."""

    node: dict[str, Any]
    tensors: dict[str, Tensor]
    said: tuple[str, ...] = ()


class AdapterKind:
    """A kind of adapter in others' files, known by what is in them and never by their names. A new one is a file in `adapter/`.

    `adapter` is its member in ldm/adapter, `word` what it is called in messages, `named` whether NAME= means something for it;
    `layouts` are what --to calls those that are written; `file` is what one is called in the folder of a run of several.
    """

    adapter: str
    word: str
    named = False
    layouts: tuple[str, ...] = ()
    file = ""

    def owns(self, name: str) -> bool:
        """Whether a tensor of that name in a model is its."""
        raise NotImplementedError

    def recognise(self, source: Foreign) -> bool:
        """Whether a file or folder holds such an adapter."""
        raise NotImplementedError

    def read(self, source: Foreign, bundle: Bundle, name: str | None) -> Read:
        """Theirs -> ours. `bundle` is the model that it is put on, its recipe and all its tensors by name; `name` is NAME."""
        raise NotImplementedError

    def write(self, adapter: Read, bundle: Bundle, target: Path, layout: str) -> None:
        """Ours -> a file or folder in one of `layouts`."""
        raise NotImplementedError


class Layout:
    """Where a model's tensors and settings lie. `words` are what --to calls it, `file` says that it is one file."""

    file = False

    def words(self) -> dict[str, str]:
        """Its words, and whose network each is for, or none."""
        raise NotImplementedError

    def recognise(self, path: Path) -> bool:
        """Whether a file or folder is in it."""
        raise NotImplementedError

    def read(self, path: Path, prediction: str | None) -> tuple[Bundle, str]:
        """-> the model apart, and the layout's word. `prediction` is what the caller says that the network says."""
        raise NotImplementedError

    def write(self, bundle: Bundle, target: Path) -> None:
        """The same again."""
        raise NotImplementedError
