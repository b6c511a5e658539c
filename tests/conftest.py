"""Tiny things that many tests need: a CLIP in a local folder, emoji shards. What is slow to import is imported where it is used:
the process that hands tests out runs none.
"""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from helpers.clip import CLIP


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def alone():
    """Leaves nothing behind that says which process this is: Lightning and several tests set it for good."""
    from pytorch_lightning.utilities import rank_zero_only

    number, words = rank_zero_only.rank, dict(os.environ)
    yield
    rank_zero_only.rank = number
    for name in os.environ.keys() - words.keys():
        del os.environ[name]
    os.environ.update(words)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP as open_clip's local-dir, with statistics of two captions."""
    import open_clip
    import torch

    from ldm.files.folder import save_tensors, write_json

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    clip = open_clip.CLIP(**CLIP)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json({"model_cfg": CLIP, "preprocess_cfg": preprocess}, folder / "open_clip_config.json")
    save_tensors(clip.state_dict(), folder / "open_clip_model.safetensors")
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 16
    return folder


@pytest.fixture(scope="session")
def emoji_root(tmp_path_factory):
    """The shards of one group of emoji, 32 px."""
    from ldm.data.emoji import Emoji

    root = tmp_path_factory.mktemp("data")
    Emoji(root=root, groups=["Activities"], val_fraction=0.2).prepare_data()
    return root


@pytest.fixture
def data(emoji_root):
    """The same as a data module."""
    from ldm.data.emoji import Emoji

    module = Emoji(root=emoji_root, groups=["Activities"], val_fraction=0.2, batch=8)
    module.prepare_data()
    module.setup()
    return module


@pytest.fixture
def bitsandbytes(monkeypatch):
    """The package where it is installed, else one of its manners: it loads states by itself, and passes hooks by."""
    import sys
    from types import SimpleNamespace

    import torch

    class AdamW8bit(torch.optim.AdamW):
        def load_state_dict(self, state_dict):
            hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
            kept = [dict(each) for each in hooks]
            for each in hooks:
                each.clear()
            super().load_state_dict(state_dict)
            for each, own in zip(hooks, kept):
                each.update(own)

    try:
        import bitsandbytes.optim  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
