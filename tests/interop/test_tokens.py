"""Prompts are cut as the published models' own tokenizer cuts them, and words that others taught a model are known."""

import pytest
import torch

from helpers.family import their_tokenizer
from ldm.files.folder import write_json
from ldm.interop.part._tokens import read_tokenizer
from ldm.tower.clip import PublishedTokenizer

PROMPTS = [
    "",
    "a red apple",
    "Tom &amp; Jerry",
    "x <|endoftext|> y",
    " <|ENDOFTEXT|> <|startoftext|>",
    "Hello! World!!",
    "ΣΑΣ İ ﬁ",
]
PROMPTS += [
    "  a\n\tb ",
    "it's 42's we'LL",
    "naïve cafe\u0301 \u4f60\u597d \U0001f600",
    "!" * 40,
    "a <Toy> and<toy>,<toy>s",
    "\u00ad\u200b a",
]


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
def test_prompts_are_cut_as_transformers_cuts_them(pad, tmp_path):
    peer = their_tokenizer(tmp_path, pad)
    peer.add_tokens(["<toy>", "<other>"])
    ours = PublishedTokenizer(16, peer.pad_token_id, ["<toy>", "<other>"])
    wanted = peer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours(PROMPTS), wanted)


def test_a_word_of_several_rows_stands_for_all():
    ours = PublishedTokenizer(16, 49407, ["<toy>", "<toy>_1", "<toy>_2"])
    assert ours(["a <toy>"])[0, :6].tolist() == [49406, 320, 49408, 49409, 49410, 49407]
    assert ours.decode(ours.encode("red  Apple,")) == "red apple ,"


def added(word, **said):
    return {"content": word, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **said}


BEGIN, END = "<|startoftext|>", "<|endoftext|>"
ENDS = {"bos_token": BEGIN, "eos_token": END, "unk_token": END}
TYPED = {name: {"__type": "AddedToken", **added(word)} for name, word in ENDS.items()}
# What lies beside the words in published pipelines' folders, key by key: tokenizer_config.json, special_tokens_map.json and
# added_tokens.json; and what they fill up with.
OLD = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
}
OLD |= {"pad_token": END}
NAMED = {"name_or_path": "openai/clip-vit-large-patch14", "special_tokens_map_file": "./special_tokens_map.json", **TYPED}
SINCE = {"clean_up_tokenization_spaces": True, "additional_special_tokens": [], "tokenizer_file": "a/tokenizer.json", **ENDS}
LARGE = {"49406": added(BEGIN, special=True), "49407": added(END, normalized=False, special=True)}
GIANT = {"0": added("!", normalized=False, special=True), **LARGE}
PUBLISHED = {
    "Stable Diffusion 1": (OLD | NAMED, {**ENDS, "pad_token": END}, {}, 49407),
    "Stable Diffusion 2": (OLD | NAMED, {**ENDS, "pad_token": "!"}, {}, 0),
    "XL, the first": (OLD | SINCE | {"added_tokens_decoder": LARGE}, ENDS, {BEGIN: 49406, END: 49407}, 49407),
    "XL, the second": (
        OLD | SINCE | {"added_tokens_decoder": GIANT, "pad_token": "!"},
        ENDS,
        {"!": 0, BEGIN: 49406, END: 49407},
        0,
    ),
}


def test_published_tokenizers_are_read_as_they_are_published(tmp_path):
    """Their configs say more than those that today's classes write."""
    their_tokenizer(tmp_path)
    for kind, (*told, padding) in PUBLISHED.items():
        for name, held in zip(("tokenizer_config", "special_tokens_map", "added_tokens"), told):
            write_json(held, tmp_path / f"{name}.json")
        assert read_tokenizer(tmp_path, 49408, 77) == {"padding": padding}, kind
