"""The text of Stable Diffusion 3, Flux and PixArt, in folders of diffusers, single files and folders of ours, both ways."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from helpers.family import their_text, their_tokenizer
from helpers.language import save_t5, t5_tokenizer, their_t5
from ldm.build import build
from ldm.conditioner import Conditioner
from ldm.files.folder import from_parts, load_tensors, write_json
from ldm.interop.bundle import Bundle
from ldm.interop.convert import add_words
from ldm.interop.find import parts
from ldm.interop.part import t5
from ldm.interop.source import File
from ldm.tower.t5 import COMMON, SIZES

CAPTIONS = ["a red fox", "", "cats with tears of joy"]
CLIP, PROJECTED, T5 = (["transformers", f"{name}"] for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"))
KINDS = {
    "sd3": {"text_encoder": PROJECTED, "text_encoder_2": PROJECTED, "text_encoder_3": T5},
    "sd3 without": {"text_encoder": PROJECTED, "text_encoder_2": PROJECTED, "text_encoder_3": [None, None]},
    "flux": {"text_encoder": CLIP, "text_encoder_2": T5},
    "pixart": {"text_encoder": T5, "_class_name": "PixArtSigmaPipeline"},
}
TEXTS = [part for part in parts() if part.kind in ("clip", "t5")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The text encoders and tokenizers of each kind, as transformers writes them."""
    home = tmp_path_factory.mktemp("texts")
    save_t5(home / "t5", their_t5(256))
    giant = their_text("gelu", 128, projection=112)
    for name, theirs in (("plain", their_text()), ("large", their_text(projection=48)), ("giant", giant)):
        theirs.save_pretrained(home / name)
        words = f"{name} words"
        their_tokenizer(home / words, "!" if name == "giant" else "<|endoftext|>").save_pretrained(home / words)
    for kind, index in KINDS.items():
        write_json({"joint_attention_dim": 256}, home / kind / "transformer" / "config.json")
        for slot, found in index.items():
            if slot.startswith("text_encoder") and found[0]:
                name = "t5" if found is T5 else "plain" if found is CLIP else "giant" if slot.endswith("_2") else "large"
                words = home / (name if name == "t5" else f"{name} words")
                shutil.copytree(home / name, home / kind / slot)
                shutil.copytree(words, home / kind / slot.replace("text_encoder", "tokenizer"))
    return home


def take(home, kind):
    bundle = Bundle({"condition": {}})
    for part in TEXTS:
        part.take_folder(home / kind, KINDS[kind], bundle)
    return bundle


def same(a, b):
    return a.parts.keys() == b.parts.keys() and all(
        a.parts[p].weights.keys() == b.parts[p].weights.keys()
        and all(torch.equal(x, b.parts[p].weights[n]) for n, x in a.parts[p].weights.items())
        for p in a.parts
    )


def conditioner_of(bundle, folder):
    for part in TEXTS:
        part.give_ours(bundle, folder)
    nodes = {n: from_parts(node, folder) for n, node in bundle.recipe["condition"].items()}
    full = {n: {**node, "precision": "float32"} if "precision" in node else node for n, node in nodes.items()}
    assert (nodes != full) == ("t5" in [part.kind for part in bundle.parts.values()]), "a T5 runs in bfloat16"
    return Conditioner({name: build(node) for name, node in full.items()})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd3", "sd3 without", "flux"])
def test_a_folders_texts_say_what_its_pipeline_says(home, tmp_path, kind):
    bundle = take(home, kind)
    conditioner = conditioner_of(bundle, tmp_path)
    words = {f"tokenizer{s}": their_tokenizer(tmp_path / f"w{s}", "!" if s else "<|endoftext|>") for s in ("", "_2")}
    third = None if kind == "sd3 without" else their_t5(256)
    if kind == "flux":
        pipe = FluxPipeline(None, None, their_text(), words["tokenizer"], third, t5_tokenizer(), None)
        pipe.tokenizer_max_length = 16
        tokens, vector, _ = pipe.encode_prompt(CAPTIONS, device="cpu")
    else:
        towers = {"text_encoder": their_text(projection=48), "text_encoder_2": their_text("gelu", 128, projection=112)}
        more = {"text_encoder_3": third, "tokenizer_3": third and t5_tokenizer(), "transformer": None, "scheduler": None}
        pipe = StableDiffusion3Pipeline(**towers, **words, **more, vae=None)
        pipe.tokenizer_max_length, pipe.transformer = (
            16,
            type("Wide", (), {"config": type("C", (), {"joint_attention_dim": 256})}),
        )
        tokens, _, vector, _ = pipe.encode_prompt(CAPTIONS, None, None, device="cpu")
    told = conditioner({"caption": CAPTIONS})
    torch.testing.assert_close(told.tokens, tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(told.vector, vector, atol=1e-5, rtol=1e-4)
    assert told.mask is None and conditioner.widths.tokens == 256


@pytest.mark.parametrize("kind", KINDS)
def test_folders_travel_to_the_bit(home, tmp_path, kind):
    """Theirs, ours, theirs: the same tensors under the same names, and the tokenizer's files as they were."""
    bundle = take(home, kind)
    recipe = json.loads(json.dumps(bundle.recipe))
    for part in TEXTS:
        part.give_ours(bundle, tmp_path / "ours")
    again = Bundle(recipe, home=tmp_path / "ours")
    for part in TEXTS:
        part.take_ours(again, tmp_path / "ours")
        part.check_folder(again)
        part.give_folder(again, tmp_path / "theirs", KINDS[kind])
    assert same(bundle, again) and [p.files for p in bundle.parts.values()] == [p.files for p in again.parts.values()]
    for path in sorted((home / kind).glob("text_encoder*/model.safetensors")):
        before, after = load_tensors(path), load_tensors(tmp_path / "theirs" / path.relative_to(home / kind))
        after = {n if n in before else n.removeprefix("text_model."): x for n, x in after.items()}
        assert before.keys() == after.keys() and all(torch.equal(x, after[n]) for n, x in before.items())
    widths = {name: width for part in TEXTS for name, width in part.tokens(bundle).items()}
    assert set(widths.values()) == {256}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_single_files_travel_to_the_bit(home, tmp_path, kind):
    """By the names of Stable Diffusion 3's published files; a file says nothing of the tokenizer, whose folder may be named."""
    bundle = take(home, kind)
    weights = {name: x for part in TEXTS for name, x in part.give_file(bundle).items()}
    names = {"text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_0.weight"}
    names |= {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"}
    names |= {"text_encoders.clip_g.transformer.text_projection.weight"} if kind == "sd3" else set()
    assert names <= weights.keys()
    file, again = File(Path("a.safetensors"), dict(weights)), Bundle({"condition": {}})
    for part in TEXTS:
        part.take_file(file, again, 1.0)
    file.check_left()
    assert same(bundle, again) and any("tokenizer: that of google/t5-v1_1-xxl" in line for line in again.assumed)
    with pytest.raises(ValueError, match=r"comes without its tokenizer.*--vocabulary FOLDER"):
        t5.PART.check_folder(again)
    add_words(again, home / "t5")
    t5.PART.check_folder(again)
    for name, node in bundle.recipe["condition"].items():
        ours, theirs = ({k: v for k, v in n.items() if k != "towers"} for n in (node, again.recipe["condition"][name]))
        assert {"final_norm": True, **ours} == {"final_norm": True, **theirs}


def test_what_a_file_shows_of_a_published_t5(home):
    xxl = COMMON | SIZES["google/t5-v1_1-xxl"]
    found = t5.config_of(t5.t5_shapes(xxl))
    assert {name: found[name] for name in xxl} == xxl
    with pytest.raises(ValueError, match=r"no T5 v1\.1: .*wi_0\.weight' is missing"):
        t5.config_of({n: s for n, s in t5.t5_shapes(xxl).items() if "wi_0" not in n})


def test_a_t5_that_is_not_v1_1_is_refused(home, tmp_path):
    shutil.copytree(home / "flux", tmp_path / "a")
    path = tmp_path / "a" / "text_encoder_2" / "config.json"
    write_json(json.loads(path.read_text()) | {"dense_act_fn": "relu"}, path)
    with pytest.raises(ValueError, match=r"T5EncoderModel with dense_act_fn=relu \(gelu_new is known\)"):
        t5.PART.take_folder(tmp_path / "a", KINDS["flux"], Bundle({"condition": {}}))
