"""Which of a folder's files are its weights: the same for text models and for the parts of pipelines."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import NotFound, Refusal
from ldm.files.pieces import best, patterns_of, read_folder, read_pieces

ORDER = ["", ".fp32", ".fp16", ".bf16", ".non_ema"]


def both(kind):
    """A variant's names, the best first."""
    return [f"model{kind}.safetensors", f"model.safetensors.index{kind}.json", f"pytorch_model{kind}.bin"]


def test_full_precision_comes_first_then_float16_and_safetensors_before_pickles():
    """As diffusers and transformers, which read a folder's files without a variant where none is asked for."""
    names = [name for kind in ORDER for name in both(kind)]
    others = ["config.json", "model.onnx", "model-00001-of-00002.safetensors", "flax_model.msgpack", "model_index.json"]
    for i, name in enumerate(names):
        if "index" not in name or i == 1:  # of one variant its name stands before or behind the index, by the alphabet
            assert best([*others, *reversed(names[i:])]) == name
    assert best(others) is None and patterns_of(others) == []
    assert best(["diffusion_pytorch_model.fp16.safetensors", "model.safetensors"], "diffusion_pytorch_model")[:9] == "diffusion"


def test_of_weights_in_pieces_all_are_wanted():
    assert patterns_of(["model.safetensors"]) == ["model.safetensors"]
    index = "model.safetensors.index.fp16.json"
    assert patterns_of([index, "model.fp16-00001-of-00002.safetensors"]) == [
        index,
        "model.fp16-*.safetensors",
        "model-*.fp16.safetensors",
    ]
    assert patterns_of(["pytorch_model.bin.index.json"])[1:] == ["pytorch_model-*.bin"]


def test_what_is_no_index_and_no_folder_of_weights_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(Refusal, match=rf"model_index\.json names no files of weights.*name its folder, {tmp_path}"):
        read_pieces(tmp_path / "model_index.json")
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(NotFound, match=r"no weights in .*: wanted model\.safetensors"):
            read_folder(place)
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match="a is int8, quantised"):
        read_folder(tmp_path)
