"""The text towers of CLIPs, one or several: open_clip's names, which are ours, and those of transformers' CLIPTextModel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import LOCAL, load_tensors, save_tensors, write_json
from ldm.interop import protocols
from ldm.interop.bundle import Bundle, Part, home_of
from ldm.interop.part._clip_file import SD3, TOWERS, named_as_today, read_texts, write_plain, write_tower
from ldm.interop.part._clip_folder import read_texts as read_folder
from ldm.interop.part._clip_folder import slots_of, texts_of, write_text_tower
from ldm.interop.part._towers import CLIP_FILES, tower_shapes, towers
from ldm.interop.part._transformers import open_clip_config, transformers
from ldm.interop.part.t5 import SILENCE
from ldm.interop.part.t5 import TARGET as T5
from ldm.interop.source import File, inner
from ldm.interop.tie import check_whole
from ldm.interop.weights import check_numbers, read_config
from ldm.tower.clip import named_text_tower

__all__ = ["PART", "Clip", "open_clip_config", "transformers"]


class Clip(protocols.Part):
    """A text tower, or several; a published recipe calls the condition `text`."""

    kind = "clip"
    word = "text tower"
    folders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def take_file(self, file: File, bundle: Bundle, scale: float) -> None:
        """The towers of Stable Diffusion 1, 2, XL and 3, and of Flux."""
        file.weights = named_as_today(file.weights)
        layer = layer_told(file)
        condition, parts, used = read_texts(file.weights, layer)
        file.used |= used
        bundle.recipe["condition"] |= condition
        bundle.parts |= parts
        if inner(file.told, "cond_stage_config.params.layer") is None:
            said = "heads there 64 wide, tokens cut as CLIPTokenizer's" if layer is None else "as modelspec.encoder_layer says"
            layers = {place: node["layers"] for place, node in towers(condition).items() if node["layers"]}
            bundle.assumed += [f"hidden layer: {numbers[0]} of {place}, {said}" for place, numbers in layers.items()]

    def give_file(self, bundle: Bundle) -> dict[str, Tensor]:
        """The same."""
        texts = towers(bundle.recipe["condition"])
        if bundle.made_by(T5) or bundle.made_by(SILENCE):
            plain = (write_plain(bundle.parts[place], prefix) for place, prefix in zip(texts, SD3))
            return {name: x for tower in plain for name, x in tower.items()}
        prefixes = TOWERS[:1] if len(texts) == 1 and bundle.made_by("ldm.condition.number.Number") is None else TOWERS[1:]
        theirs: dict[str, Tensor] = {}
        for (place, node), prefix in zip(texts.items(), prefixes):
            theirs |= write_tower(bundle.parts[place], prefix, list(node.get("layers", [-1])))
        return theirs

    def take_folder(self, folder: Path, index: Mapping[str, Any], bundle: Bundle) -> None:
        """The text encoders and their tokenizers."""
        condition, parts = read_folder(folder, index)
        bundle.recipe["condition"] |= condition
        bundle.parts |= parts

    def give_folder(self, bundle: Bundle, folder: Path, index: Mapping[str, Any]) -> None:
        """The same."""
        texts = texts_of(bundle)
        for slot, (node, part) in zip(slots_of(index), texts, strict=True):
            write_text_tower(node, part, folder, slot)

    def check_folder(self, bundle: Bundle) -> None:
        """A pipeline reads some layers only."""
        texts_of(bundle)

    def tokens(self, bundle: Bundle) -> dict[str, int]:
        """As wide as its towers' layers together; of towers that lie elsewhere, where the recipe says it."""
        made = {}
        for name, node in bundle.recipe["condition"].items():
            there = {place: n for place, n in towers({name: node}).items() if place in bundle.parts}
            each = [(n, bundle.parts[place].config["text_cfg"]["width"]) for place, n in there.items()]
            together = sum(len(n.get("layers", [-1])) * width for n, width in each)
            made |= {name: node.get("width") or together} if together else {}
        return made

    def take_ours(self, bundle: Bundle, folder: Path) -> None:
        """The folders that the conditions name, or open_clip's own by name."""
        for place, node in towers(bundle.recipe["condition"]).items():
            bundle.parts[place] = _tower(node, folder)

    def give_ours(self, bundle: Bundle, folder: Path) -> None:
        """The same."""
        for place, part in bundle.parts.items():
            if part.kind == self.kind:
                write_json({"model_cfg": part.config, "preprocess_cfg": {}}, folder / place / CLIP_FILES[0])
                save_tensors(part.weights, folder / place / CLIP_FILES[1])


def layer_told(file: File) -> int | None:
    """Which hidden state of the only text tower is read, where the yaml or the header says so.

    Raises:
        Refusal: it is none that is known.
    """
    params = inner(file.told, "cond_stage_config.params") or {}
    word, number = params.get("layer"), params.get("layer_idx")
    if word not in (None, "last", "penultimate") or number is not None:
        raise Refusal(
            f"{file.path.with_suffix('.yaml')} has cond_stage_config.params.layer={word}, layer_idx={number}; last and "
            "penultimate are known, which the tower's last LayerNorm follows."
        )
    header = file.header.get("modelspec.encoder_layer")
    first = any(name.startswith(f"{TOWERS[0]}transformer.") for name in file.weights)  # Stable Diffusion 1's
    if word is None and first and header in ("1", "2"):
        return -int(header)
    return {"last": -1, "penultimate": -2}.get(word)


def _tower(node: Mapping[str, Any], folder: Path) -> Part:
    if not node["model"].startswith(LOCAL):
        config, weights = named_text_tower(node["model"], node.get("pretrained"))
        return Part(config, weights, kind="clip")
    home = home_of(node["model"].removeprefix(LOCAL), folder)
    config, weights = read_config(home / CLIP_FILES[0])["model_cfg"], load_tensors(home / CLIP_FILES[1])
    shapes = tower_shapes(config)
    own = {name: x for name, x in weights.items() if name in shapes}  # beside them may lie a picture tower's
    check_whole(own, shapes, str(home / CLIP_FILES[1]))
    check_numbers(own, home / CLIP_FILES[1])
    return Part(config, own, kind="clip")


PART = Clip()
