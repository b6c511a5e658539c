"""A small T5 for the recipes that read one, shrunken:  python -m benchmarks.t5

Writes runs/tiny/t5: an encoder of 256 features with random weights, and a tokenizer of the emoji's words. It has
learned nothing; what it says of a caption depends on the words and their places, by which a backbone tells them apart.
"""

from collections import Counter
from math import log
from pathlib import Path

import torch

from ldm.build import build
from ldm.compose import compose_config
from ldm.files.folder import save_tensors, write_json
from ldm.tower.t5 import COMMON, build_t5
from ldm.tower.words import tokenizer_of

HOME = Path("runs/tiny/t5")
SPECIAL, UNSEEN = ("<pad>", "</s>", "<unk>"), -20.0
SIZES = {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8, "relative_attention_num_buckets": 32}


def save_t5(captions, folder):
    """Writes a T5 of these captions' words, as transformers does."""
    words = Counter(word for caption in captions for word in caption.split())
    scores = {f"▁{word}": log(n / words.total()) for word, n in words.most_common(2000)}
    letters = dict.fromkeys(sorted({"▁", *"".join(words)} - scores.keys()), UNSEEN)
    tokenizer = tokenizer_of([*((word, 0.0) for word in SPECIAL), *scores.items(), *letters.items()])
    config = {**COMMON, **SIZES, "architectures": ["T5EncoderModel"], "vocab_size": tokenizer.get_vocab_size()}
    torch.manual_seed(0)
    tower = build_t5(config, str(folder))
    for name, weight in tower.named_parameters():
        if weight.ndim > 1:  # as T5's own beginning, with attention unscaled
            torch.nn.init.normal_(weight, std=1.0 if "shared" in name else weight.shape[1] ** -0.5)
    write_json(config, folder / "config.json")
    save_tensors(tower.state_dict(), folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}, folder / "tokenizer_config.json")


if __name__ == "__main__":
    emoji = build(compose_config("train", ["data=emoji"]).data)
    emoji.prepare_data()
    emoji.setup("fit")
    save_t5([caption for batch in emoji.ordered("train", 256) for caption in batch["caption"]], HOME)
    print(f"The T5 is in {HOME}.")
