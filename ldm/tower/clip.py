"""A frozen CLIP, by open_clip's name or from a local folder: its towers, its tokenizer, and their embeddings.

open_clip takes seconds to import, so it is imported where it is used: a config is checked without it.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.called import command_line
from ldm.files.folder import LOCAL, as_run, load_tensors
from ldm.nn.empty import is_planned, is_weightless, weighted, weightless


def load_clip(model: str, pretrained: str | None, option: str) -> nn.Module:
    """An open_clip model, frozen, on torch's default device.

    Args:
        model: open_clip's name, or `local-dir:FOLDER`.
        pretrained: open_clip's tag, or a local file; None for random weights, and for a local folder, which has its own.
        option: the setting to name in errors, such as `condition.text`.

    Raises:
        NotFound: a local folder without a CLIP; the message names the command that trains one. Unreachable: the weights are
            not here, and not had.
    """
    folder = Path(model.removeprefix(LOCAL))
    if model.startswith(LOCAL) and not (folder / "open_clip_config.json").is_file():
        raise NotFound(
            f"There is no CLIP in {folder} (open_clip_config.json is missing). Train one first: "
            f"{command_line('train')} experiment=emoji/clip {as_run(folder)}; or name another with "
            f"{option}.model=local-dir:FOLDER, or one of open_clip's names with {option}.pretrained=TAG_OR_FILE."
        )
    import open_clip

    if is_weightless() and (not pretrained or is_planned()) and ":" not in model:
        return open_clip.create_model(model, device="meta").eval().requires_grad_(False)
    try:
        with weighted():
            clip = open_clip.create_model(model, pretrained=pretrained, device=torch.get_default_device())
    except RuntimeError as error:
        if "download" not in str(error):
            raise
        raise Unreachable(
            f"{option}.model={model}: open_clip could not fetch the weights {pretrained} ({' '.join(str(error).split())}) Name "
            f"another tag or a local file with {option}.pretrained=TAG_OR_FILE."
        ) from error
    return clip.eval().requires_grad_(False)


def load_text_tower(model: str, pretrained: str | None, option: str) -> nn.Module:
    """The text tower alone of `load_clip`'s model, whose arguments it takes; a local folder need not hold the image tower.

    Raises:
        NotFound: as `load_clip`. Refusal: the folder's weights are not those of its text tower.
    """
    folder = Path(model.removeprefix(LOCAL))
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())["model_cfg"] if model.startswith(LOCAL) and path.is_file() else {}
    if not config or config.get("custom_text") or "hf_model_name" in config["text_cfg"]:
        clip = load_clip(model, pretrained, option)
        if not hasattr(clip, "token_embedding"):
            return clip.text
    else:
        with weightless():
            clip = blank_text_tower(config)
        weights = load_tensors(folder / "open_clip_model.safetensors")
        text = set(clip.state_dict()) - {"logit_scale"}
        if lacking := sorted(text - weights.keys()):
            raise Refusal(f"{option}.model={model}: its weights lack {lacking[:3]} of the text tower; export the CLIP again.")
        whole = {name: weights[name].float() for name in text} | {"logit_scale": torch.zeros(())}
        with weighted():
            clip.load_state_dict(whole, assign=True)
        return clip
    del clip.visual
    return clip


def blank_text_tower(config: Mapping[str, Any]) -> nn.Module:
    """open_clip's model_cfg -> its text tower, frozen, with random weights."""
    import open_clip

    gelu = config.get("quick_gelu", False)
    clip = open_clip.CLIP(config["embed_dim"], NO_VISION, config["text_cfg"], quick_gelu=gelu).eval().requires_grad_(False)
    del clip.visual
    return clip


def blank_image_tower(config: Mapping[str, Any]) -> nn.Module:
    """open_clip's model_cfg -> its image tower, a transformer, frozen, with random weights."""
    import open_clip

    gelu = config.get("quick_gelu", False)
    clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], NO_TEXT, quick_gelu=gelu).eval().requires_grad_(False)
    return clip.visual


def is_plain(visual: nn.Module) -> bool:
    """Whether an image tower is a transformer of a class token and patches, whose class token is the picture's embedding."""
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"


def named_text_tower(model: str, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's name and tag -> the name's model_cfg, and its text tower's weights by name."""
    import open_clip

    tower = load_text_tower(model, pretrained, "condition.text")
    return open_clip.get_model_config(model), {n: x for n, x in tower.state_dict().items() if n != "logit_scale"}


@lru_cache
def vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's byte-pair encoding, which ships with open_clip, as OpenAI wrote it -> ids by token, and the merges in order."""
    from open_clip.tokenizer import SimpleTokenizer

    words = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {names.get(word, word): number for word, number in words.encoder.items()}, [
        " ".join(pair) for pair in sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    ]


BEGIN, END = "<|startoftext|>", "<|endoftext|>"
FIRST_LEARNED = 49408  # the id behind those of CLIP's vocabulary
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class PublishedTokenizer:
    """CLIP's tokenizer, equal to transformers' CLIPTokenizer, with which the published Stable Diffusions were trained.

    It differs from open_clip's in three ways: HTML entities are not decoded, the begin, end and padding tokens are special
    tokens when a prompt spells them, and `learned` words (textual inversion) are one token each, from id 49408 on, in any case;
    of a word that was learned as several rows (`word`, `word_1`, ...) the first stands for all, as in diffusers.

    Args:
        length: tokens of a caption, the begin and the end included.
        padding: the id of the padding behind the end.
        learned: the learned words, in the order of their rows.
    """

    def __init__(self, length: int, padding: int, learned: Sequence[str] = ()) -> None:
        ids, merges = vocabulary()
        pairs = [tuple(pair.split(" ")) for pair in merges]
        self.pieces = Tokenizer(models.BPE(ids, pairs, end_of_word_suffix="</w>", unk_token=END, continuing_subword_prefix=""))
        self.pieces.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        self.pieces.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.pieces.decoder = decoders.ByteLevel()
        pad = next(word for word, number in ids.items() if number == padding)
        self.pieces.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (BEGIN, END, pad)])
        self.pieces.add_tokens([AddedToken(word, normalized=True) for word in learned])
        self.begin, self.end, self.padding, self.length = ids[BEGIN], ids[END], padding, length
        self.rows = {FIRST_LEARNED + i: _rows_of(word, learned) for i, word in enumerate(learned)}

    def encode(self, caption: str) -> list[int]:
        """-> the ids of a caption, without begin and end, not truncated."""
        return [row for number in self.pieces.encode(caption).ids for row in self.rows.get(number, (number,))]

    def decode(self, ids: Sequence[int]) -> str:
        """-> the text of some ids."""
        return self.pieces.decode(list(ids), skip_special_tokens=False).replace("</w>", " ").strip()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, length) ids: begin, caption (truncated to length - 2), end, padding."""
        rows = [[self.begin, *self.encode(caption)[: self.length - 2], self.end] for caption in captions]
        return torch.tensor([row + [self.padding] * (self.length - len(row)) for row in rows])


def _rows_of(word: str, learned: Sequence[str]) -> list[int]:
    """-> the ids of a learned word, and of word_1, word_2, ... as far as these were learned."""
    places = {name: FIRST_LEARNED + i for i, name in enumerate(learned)}
    rows = [places[word]]
    while (row := places.get(f"{word}_{len(rows)}")) is not None:
        rows.append(row)
    return rows


def names_of(word: str, count: int) -> list[str]:
    """-> the names of the tokens of a word with `count` rows: word, word_1, ..."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


NO_VISION = {"image_size": 1, "patch_size": 1, "layers": 0, "width": 1, "head_width": 1}
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the colours that OpenAI's CLIP saw


def preprocess(visual: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, h, w) in [-1, 1] -> (B, 3, H, W), resized and normalised for an image tower; differentiable."""
    if images.shape[2:] != visual.image_size:
        images = interpolate(images, visual.image_size, mode="bicubic", antialias=True)
    mean, std = (images.new_tensor(visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images.add(1).div(2) - mean) / std


def settings(visual: nn.Module) -> dict[str, Any]:
    """-> the preprocessing of an image tower, as plain values: size, mean, standard deviation, interpolation."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dict(visual.preprocess_cfg).items()}


def transform(visual: nn.Module) -> Callable[[Any], Tensor]:
    """-> open_clip's own preprocessing for this image tower: a PIL picture -> (3, H, W)."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)


def embed_text(tower: nn.Module, ids: Tensor, end: int | None = None, projected: bool = True) -> tuple[list[Tensor], Tensor]:
    """The embeddings of a text tower: ids (B, L) -> hidden states, (B, L, D) each, and the pooled embedding, (B, E).

    The hidden states are those before the first block, after the first, ..., after the last, none of them normalised. The pooled
    embedding is the last one, normalised, at the end token, and with `projected`, where the tower has a projection, in the space
    of the pictures' embeddings. `end` is the end token's id; None for the largest id of each text.
    """
    hidden = [tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]]
    for block in tower.transformer.resblocks:
        hidden.append(block(hidden[-1], attn_mask=tower.attn_mask))
    pooled = tower.ln_final(hidden[-1])[torch.arange(len(ids)), _ends(ids, end)]
    return hidden, pooled @ tower.text_projection if projected and tower.text_projection is not None else pooled


def embed_image(tower: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """pictures: (B, 3, h, w), as the tower was trained -> the tokens that its last block but one puts out, (B, 1 + N, D), the
    class token first, and the pictures' embedding, (B, E)."""
    at = len(tower.transformer.resblocks) - 2
    seen = tower.forward_intermediates(pictures, indices=[at], output_fmt="NLC", output_extra_tokens=True)
    tokens = torch.cat((seen["image_intermediates_prefix"][0], seen["image_intermediates"][0]), dim=1)
    return tokens, seen["image_features"]


def text_mask(ids: Tensor, end: int | None = None) -> Tensor:
    """ids: (B, L); `end` as in `embed_text` -> mask (B, L) bool, True up to the end token, itself included."""
    return torch.arange(ids.shape[1], device=ids.device) <= _ends(ids, end)[:, None]


def _ends(ids: Tensor, end: int | None) -> Tensor:
    """(B, L) -> (B), the position of the first `end`, or of the largest id."""
    return ids.argmax(dim=1) if end is None else (ids == end).int().argmax(dim=1)


def warn_of_cut(caption: str, tokenizer: Any, length: int) -> str:
    """-> the same caption; where it has more than `length` - 2 tokens, a warning quotes the rest, which is cut off."""
    ids = tokenizer.encode(caption) if hasattr(tokenizer, "encode") else []
    if len(ids) > length - 2:
        warnings.warn(
            f"{len(ids)} tokens do not fit into {length - 2}; cut off: {tokenizer.decode(ids[length - 2 :])!r}", stacklevel=2
        )
    return caption
