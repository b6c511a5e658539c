"""Small language models as transformers builds and saves them, with random weights."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel, T5Tokenizer

from helpers.family import loud
from ldm.files.folder import write_json

WORDS = "▁a ▁red ▁fox ▁apple ▁cat ▁face ▁with ▁tear ▁of ▁joy s fox cat ▁fi ne ﬁ é".split()
PIECES = [*((word, -1.0 - i / 10) for i, word in enumerate(WORDS)), *((f"{c}", -8.0) for c in "▁abcdefghijklmnopqrstuvwxyz0")]
VOCABULARY = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES]


def t5_tokenizer():
    """transformers' T5 tokenizer, of few words."""
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5Tokenizer(vocab=[*VOCABULARY, *extra])


def their_t5(width=32, **settings):
    """transformers' T5 v1.1 encoder."""
    torch.manual_seed(7)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
    words = len(VOCABULARY) + 100 + 4  # the published table has rows to spare
    return loud(T5EncoderModel(T5Config(vocab_size=words, feed_forward_proj="gated-gelu", **sizes, **settings)))


def save_t5(folder, model=None, **settings):
    """A T5 and its tokenizer in one folder, as transformers writes them."""
    (model or their_t5()).save_pretrained(folder, **settings)
    t5_tokenizer().save_pretrained(folder)
    return folder


def in_full(folder):
    """A model at rest whose language models are read in float32, as they lie, and not in the bfloat16 that its recipe says."""
    config = json.loads((folder / "config.json").read_text())
    for node in config["condition"].values():
        node |= {"precision": "float32"} if "precision" in node else {}
    write_json(config, folder / "config.json")
    return folder


def save_qwen(folder):
    """A Qwen and its tokenizer, of bytes: a language model that reads from left to right."""
    torch.manual_seed(8)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    loud(Qwen3Model(Qwen3Config(vocab_size=260, num_key_value_heads=2, **sizes))).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer(begin=None, end="<|end|>"):
    """A tokenizer of bytes."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet | {"<|end|>": 256, "<bos>": 257}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|end|>", bos_token=begin, eos_token=end)
