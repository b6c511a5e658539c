"""T5 v1.1's encoder, `condition=[language]`, whose tensors have the names of transformers' T5EncoderModel's here as well.

In folders of diffusers it is text_encoder_3 (Stable Diffusion 3), text_encoder_2 (Flux) or text_encoder (PixArt), each with its
tokenizer, whose files are kept as they are; in single files it lies behind `text_encoders.t5xxl.transformer.`, without one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import save_tensors, write_json
from ldm.files.pieces import read_folder
from ldm.files.whole import write_whole
from ldm.interop import protocols
from ldm.interop.bundle import Bundle, Part, home_of, shapes_of
from ldm.interop.files import take_part
from ldm.interop.keys import check_keys
from ldm.interop.source import File
from ldm.interop.tie import Shapes, check_whole, same, tied
from ldm.interop.weights import check_numbers, read_config
from ldm.tower.language import is_t5
from ldm.tower.t5 import COMMON, TIED, build_t5, encoder_of
from ldm.tower.words import FILES

TARGET, SILENCE = "ldm.condition.language.Language", "ldm.condition.language.Silence"
NODE = {"_target_": TARGET, "precision": "bfloat16"}  # 9.5 GB for xxl, half of what float32 takes
PREFIX = "text_encoders.t5xxl.transformer."
PLACE = "condition.language"
PUBLISHED = "google/t5-v1_1-xxl"  # whose tokenizer all of them have
KEPT = (*FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# How each slot of a pipeline is read: the most tokens of a caption, and what becomes of the padding.
SLOTS = {"_3": (256, "attended"), "_2": (512, "attended"), "": (300, "masked")}
ALPHA = {"PixArtAlphaPipeline": 120}


def slot_of(index: Mapping[str, Any]) -> str | None:
    """Where in a pipeline a T5 is, if there is one."""
    named = {slot: index.get(f"text_encoder{slot}") or [None, None] for slot in SLOTS}
    return next((slot for slot, (_, kind) in named.items() if kind == "T5EncoderModel"), None)


def without_t5(index: Mapping[str, Any]) -> bool:
    """Whether it is a Stable Diffusion 3 that was saved without its T5."""
    return "text_encoder_3" in index and not index["text_encoder_3"][0]


def t5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a T5's encoder, which is not built in memory."""
    with torch.device("meta"):
        return shapes_of(build_t5(config, "The T5"))


def config_of(shapes: Shapes) -> dict[str, Any]:
    """A T5's names and shapes -> transformers' config of it; nothing else differs among the published ones.

    Raises:
        Refusal: this is none.
    """
    first = "encoder.block.0.layer."
    try:
        words, width = shapes["shared.weight"]
        buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
        sizes = {"d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // heads}
        sizes["d_ff"] = shapes[f"{first}1.DenseReluDense.wi_0.weight"][0]
    except KeyError as error:
        raise Refusal(f"The text model is no T5 v1.1: {error} is missing among its tensors.") from error
    sizes |= {"vocab_size": words, "d_model": width, "num_heads": heads, "relative_attention_num_buckets": buckets}
    sizes["num_layers"] = sum(name.endswith(".0.layer_norm.weight") for name in shapes)
    return {"architectures": ["T5EncoderModel"], **COMMON, **sizes}


def widen(bundle: Bundle, width: int) -> None:
    """Fills several CLIPs' tokens up to a T5's width, beside which they stand."""
    for node in bundle.recipe["condition"].values():
        if node["_target_"] == "ldm.condition.text.Texts":
            node["width"] = width


class T5(protocols.Part):
    """A frozen T5; a published recipe calls the condition `language`. Other models of transformers stay where they are."""

    kind = "t5"
    word = "T5"
    folders = ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")

    def take_file(self, file: File, bundle: Bundle, scale: float) -> None:
        """Without a tokenizer, which is the published one's."""
        if not (theirs := file.below(PREFIX)):
            return
        config = config_of(theirs)
        shapes = t5_shapes(config)
        weights = file.take(tied(shapes, same), shapes, PREFIX)
        file.used.add(PREFIX + TIED)
        length, padding = SLOTS["_3" if any(n.startswith("text_encoders.clip_g.") for n in file.weights) else "_2"]
        self._put(bundle, Part(config, weights, self.kind), length=length, padding=padding, tokenizer=PUBLISHED)
        bundle.assumed.append(f"tokenizer: that of {PUBLISHED}")

    def give_file(self, bundle: Bundle) -> dict[str, Tensor]:
        """The same."""
        return {PREFIX + name: x for _, part in self._of(bundle) for name, x in part.weights.items()}

    def take_folder(self, folder: Path, index: Mapping[str, Any], bundle: Bundle) -> None:
        """A text encoder and its tokenizer; zeros where a Stable Diffusion 3 has none."""
        if without_t5(index):
            width = read_config(folder / "transformer" / "config.json")["joint_attention_dim"]
            bundle.recipe["condition"]["language"] = {"_target_": SILENCE, "length": SLOTS["_3"][0], "width": width}
            widen(bundle, width)
        if (slot := slot_of(index)) is None:
            return
        home = folder / f"text_encoder{slot}"
        config = read_config(home / "config.json")
        check_keys(config, "T5EncoderModel", str(home))
        shapes = t5_shapes(config)
        weights = take_part(home, tied(shapes, same), shapes, "model", left=(TIED,))
        length, padding = SLOTS[slot]
        length = ALPHA.get(index.get("_class_name"), length)
        part = Part(dict(config), weights, self.kind, files=tokenizer_files(folder / f"tokenizer{slot}"))
        self._put(bundle, part, length=length, padding=padding)

    def give_folder(self, bundle: Bundle, folder: Path, index: Mapping[str, Any]) -> None:
        """The same."""
        for _, part in self._of(bundle):
            slot = slot_of(index)
            _write(part, folder / f"text_encoder{slot}", folder / f"tokenizer{slot}")

    def take_ours(self, bundle: Bundle, folder: Path) -> None:
        """From a folder that the condition names; what it names on the hub stays there."""
        for name, node in bundle.recipe["condition"].items():
            home = home_of(node["model"], folder) if node.get("_target_") == TARGET else None
            if home is None or not home.is_dir() or not is_t5(config := read_config(home / "config.json")):
                continue
            weights, words = encoder_of(read_folder(home)), node.get("tokenizer")
            check_whole(weights, t5_shapes(config), str(home))
            check_numbers(weights, home)
            words = home if words is None else home_of(words, folder)
            files = tokenizer_files(words) if words.is_dir() else {}
            bundle.parts[f"condition.{name}"] = Part(dict(config), weights, self.kind, files=files)

    def give_ours(self, bundle: Bundle, folder: Path) -> None:
        """The same, with its tokenizer beside it."""
        for place, part in self._of(bundle):
            _write(part, folder / place, folder / place)

    def check_folder(self, bundle: Bundle) -> None:
        """With its tokenizer, and read as pipelines read it."""
        for place, part in self._of(bundle):
            node = bundle.recipe["condition"][place.removeprefix("condition.")]
            if not part.files:
                raise Refusal(
                    f"The T5 of {place} comes without its tokenizer ({' or '.join(FILES)}), which a folder of diffusers holds: "
                    f"name a folder with that of {PUBLISHED} by --vocabulary FOLDER."
                )
            if node.get("layer", -1) != -1 or node.get("dropped", "empty_prompt") != "empty_prompt":
                raise Refusal(f"diffusers' pipelines read a T5's last layer, and the empty prompt; {place} is {node}.")

    def add_words(self, bundle: Bundle, folder: Path) -> bool:
        """Gives a T5 the tokenizer in a folder; whether there is a T5."""
        for place, part in self._of(bundle):
            part.files = tokenizer_files(folder)
            bundle.recipe["condition"][place.removeprefix("condition.")].pop("tokenizer", None)
        return bool(self._of(bundle))

    def tokens(self, bundle: Bundle) -> dict[str, int]:
        """As wide as it is."""
        return {place.removeprefix("condition."): part.config["d_model"] for place, part in self._of(bundle)}

    def _put(self, bundle: Bundle, part: Part, **settings: Any) -> None:
        bundle.recipe["condition"]["language"] = {**NODE, "model": f"./{PLACE}", **settings}
        bundle.parts[PLACE] = part
        widen(bundle, part.config["d_model"])

    def _of(self, bundle: Bundle) -> list[tuple[str, Part]]:
        return [(place, part) for place, part in bundle.parts.items() if part.kind == self.kind]


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer by name.

    Raises:
        Refusal: there is none.
    """
    files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    if not files.keys() & {*FILES}:
        raise Refusal(f"There is no tokenizer in {folder}: wanted {' or '.join(FILES)}, as {PUBLISHED} has it.")
    return files


def _write(part: Part, tower: Path, words: Path) -> None:
    write_json({k: v for k, v in part.config.items() if k != "format"}, tower / "config.json")
    save_tensors(part.weights, tower / "model.safetensors")
    words.mkdir(parents=True, exist_ok=True)
    for name, data in part.files.items():
        write_whole(words / name, lambda temporary, data=data: temporary.write_bytes(data))


PART = T5()
