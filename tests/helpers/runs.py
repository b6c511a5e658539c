"""runs/quickstart as the configs expect it, untrained, and runs/bert, a few words."""

import torch

from ldm.build import build
from ldm.condition.cached_text import save_null
from ldm.condition.text import Text
from ldm.files.folder import save_model, write_text

AUTOENCODER = {"_target_": "ldm.autoencoder.kl.KL", "width": 8, "mult": [1, 1], "groups": 4}


def write_runs(runs, clip_folder):
    """Into the folder `runs`; -> that folder."""
    home = runs / "quickstart"
    home.mkdir(parents=True)
    (home / "clip").symlink_to(clip_folder)
    save_model(build(AUTOENCODER).state_dict() | {"count": torch.tensor(1)}, AUTOENCODER, home / "autoencoder")
    write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fox"]), runs / "bert" / "vocab.txt")
    save_null(Text(f"local-dir:{clip_folder}"), home / "latents" / "text")
    return runs


def untrained(config):
    """A config without the pretrained weights of towers, which would be fetched, and without statistics."""
    for name, condition in config.condition.items():
        for node in (condition, *(condition.get("towers") or {}).values()):
            node.update({"pretrained": None} if "pretrained" in node else {})
        if name == "text" and "whiten" in condition:
            condition.whiten = False
    return config
