"""Prompts are cut as the published models' own tokenizer cuts them, and words that others taught a model are known."""

import pytest
import torch

from helpers.family import their_tokenizer
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
