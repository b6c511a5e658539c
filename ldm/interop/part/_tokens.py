"""The folder of a CLIPTokenizer: CLIP's own vocabulary, what it pads with, and the words that it was taught besides."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.files.folder import write_json, write_text
from ldm.interop.keys import check_keys
from ldm.interop.weights import read_config
from ldm.tower.clip import BEGIN, END, FIRST_LEARNED, vocabulary

PADDING = {"!": 0, END: 49407}
PLAIN = ("lstrip", "rstrip", "single_word", "special")  # of a word: where it stands, or that its case counts


def read_tokenizer(folder: Path, rows: int, length: int) -> dict[str, Any]:
    """What a text condition is told of its tokenizer; the tower's table has so many rows, and its captions so many tokens.

    Raises:
        Refusal: another vocabulary than CLIP's, or a way of cutting that is not CLIPTokenizer's.
    """
    path, told = folder / "tokenizer_config.json", _told(folder)
    kind = told.get("tokenizer_class", "CLIPTokenizer")
    if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise Refusal(f"{path} is of a {kind}; CLIPTokenizer is known.")
    check_keys({name: _word(value) for name, value in told.items()}, "CLIPTokenizer", str(path))
    pad = padding(folder)
    most = told.get("model_max_length", length)
    if type(most) not in (int, float) or (most != length and most < 1e6):
        raise Refusal(f"{path} has model_max_length={most}; the text encoder reads {length} tokens.")
    _check_vocabulary(folder)
    learned = _learned(folder, told)
    known = {BEGIN, END, *PADDING, *learned}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        said = told.get(name) or []
        words = [_word(word) for word in (said.values() if isinstance(said, dict) else said)]
        if strange := [word for word in words if word not in known]:
            raise Refusal(f"{path} has {name}={strange}, tokens of its own; plain words that were added are known.")
    if rows < FIRST_LEARNED + len(learned):
        raise Refusal(f"{path} has {len(learned)} learned tokens; the text encoder's table has {rows} rows, too few for them.")
    return {"padding": pad, **({"learned": learned} if learned else {})}


def padding(folder: Path) -> int:
    """The id of the token that a tokenizer pads with.

    Raises:
        Refusal: it is neither of the published ones.
    """
    word = _word(_told(folder).get("pad_token", END))
    if word not in PADDING:
        raise Refusal(f"{folder / 'tokenizer_config.json'} has pad_token={word!r}; {', '.join(PADDING)} are known.")
    return PADDING[word]


def write_tokenizer(folder: Path, pads: int, learned: Sequence[str], length: int) -> None:
    """The folder of a CLIPTokenizer."""
    ids, merges = vocabulary()
    write_text(json.dumps(ids, ensure_ascii=False), folder / "vocab.json")
    write_text("#version: 0.2\n" + "\n".join(merges) + "\n", folder / "merges.txt")
    pad = next(word for word, number in PADDING.items() if number == pads)
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    told |= {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json({k: v for k, v in told.items() if k.endswith("_token")}, folder / "special_tokens_map.json")
    if learned:
        off = {"lstrip": False, "rstrip": False, "single_word": False}
        added = {str(ids[word]): {"content": word, **off, "normalized": False, "special": True} for word in {pad, BEGIN, END}}
        plain = {**off, "normalized": True, "special": False}
        added |= {str(FIRST_LEARNED + i): {"content": word, **plain} for i, word in enumerate(learned)}
        told["added_tokens_decoder"] = added
        write_json({word: FIRST_LEARNED + i for i, word in enumerate(learned)}, folder / "added_tokens.json")
    write_json(told, folder / "tokenizer_config.json")


def _told(folder: Path) -> dict[str, Any]:
    told, special = read_config(folder / "tokenizer_config.json"), folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in told and special.is_file():  # Stable Diffusion 2's says there what it pads with
        told |= read_config(special)
    return told


def _learned(folder: Path, told: Mapping[str, Any]) -> list[str]:
    """The words beyond CLIP's, in the order of their rows, wherever the folder keeps them."""
    added: dict[int, Mapping[str, Any]] = {int(i): word for i, word in told.get("added_tokens_decoder", {}).items()}
    if (whole := folder / "tokenizer.json").is_file():
        added |= {word["id"]: word for word in read_config(whole).get("added_tokens", [])}
    if (beside := folder / "added_tokens.json").is_file():
        added |= {i: {"content": word} for word, i in read_config(beside).items() if i not in added}
    ids, pad = vocabulary()[0], _word(told.get("pad_token", END))
    whole = [w["content"] for i, w in added.items() if ids.get(w["content"]) == i and w["content"] not in (BEGIN, END, pad)]
    if whole:
        raise Refusal(
            f"{folder} has added tokens that are pieces of CLIP's own vocabulary, {whole[:5]}, whole; that is not known."
        )
    learned = sorted(i for i, word in added.items() if ids.get(word["content"]) != i)
    if learned != list(range(FIRST_LEARNED, FIRST_LEARNED + len(learned))):
        raise Refusal(f"{folder} has added tokens of the ids {learned[:5]}; ids from {FIRST_LEARNED} on, one by one, are known.")
    for word in (added[i] for i in learned):
        if strange := [name for name in PLAIN if word.get(name)] + ([] if word.get("normalized", True) else ["normalized=false"]):
            raise Refusal(f"{folder}: the added token {word['content']!r} has {', '.join(strange)}; plain ones are known.")
    return [added[i]["content"] for i in learned]


def _check_vocabulary(folder: Path) -> None:
    """Raises ValueError where the words or their merges are not CLIP's, or nothing says them."""
    ids, merges = vocabulary()
    whole, words, pairs = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if words.is_file():
        found, joins = read_config(words), pairs.read_text(encoding="utf-8").split("\n")[1:] if pairs.is_file() else merges
    elif whole.is_file():
        model = read_config(whole)["model"]
        found, joins = model["vocab"], [p if isinstance(p, str) else " ".join(p) for p in model["merges"]]
    else:
        raise Refusal(f"{folder} holds no vocab.json and no tokenizer.json: nothing says which words the tokens are.")
    if dict(found) != ids or [join for join in joins if join][: len(merges)] != merges:
        raise Refusal(f"{folder} has a vocabulary of its own ({len(found):,} tokens); CLIP's, of {len(ids):,}, is known.")


def _word(value: Any) -> Any:
    return value["content"] if isinstance(value, dict) and "content" in value else value
