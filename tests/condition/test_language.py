"""Long captions: what a T5 and other language models tell a network, as the published pipelines tell it."""

import re
import shutil
from functools import partial

import pytest
import torch
from diffusers import FluxPipeline, PRXPipeline, StableDiffusion3Pipeline
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from helpers.family import their_text, their_tokenizer
from helpers.language import byte_tokenizer, save_qwen, save_t5, t5_tokenizer, their_t5
from ldm.condition.cached_text import CachedText, save_null, spoken_only
from ldm.condition.language import Language
from ldm.condition.text import Text, Texts
from ldm.condition.together import Together
from ldm.conditioner import Conditioner
from ldm.embedder import Condition
from ldm.files.folder import from_parts, save_tensors, with_parts, write_json
from ldm.interop.part._towers import tower_shapes
from ldm.interop.part.clip import open_clip_config, transformers
from ldm.interop.tie import bring
from ldm.types import Draw, Widths

CAPTIONS = ["a red fox", "", "cats with tears of joy, été", " ".join(["apple"] * 30)]
LENGTH = 24


def no(count):
    return torch.zeros(count, dtype=torch.bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"), their_t5(256))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two CLIPs of transformers, and the same as folders of open_clip."""
    home, found = tmp_path_factory.mktemp("clips"), []
    for name, act, width in (("large", "quick_gelu", 64), ("giant", "gelu", 128)):
        theirs = their_text(act, width, projection=width - 16)
        as_open_clip(theirs, home / name)
        found.append((theirs, their_tokenizer(home / f"{name}-words", "!" if name == "giant" else "<|endoftext|>")))
    return home, found


def as_open_clip(theirs, folder):
    """transformers' text tower as a folder of open_clip."""
    config = open_clip_config(theirs.config.to_dict(), type(theirs).__name__.endswith("Projection"))
    shapes = tower_shapes(config)
    weights = {n if n.startswith("text_") else f"text_model.{n}": x for n, x in theirs.state_dict().items()}
    save_tensors(bring(transformers(shapes), weights, shapes), folder / "open_clip_model.safetensors")
    write_json({"model_cfg": config, "preprocess_cfg": {}}, folder / "open_clip_config.json")


def clip(home, name, **settings):
    padding = 0 if name == "giant" else 49407
    return Text(f"local-dir:{home}/{name}", pooled=True, padding=padding, tokenizer="clip", **settings)


@torch.no_grad()
def test_conditions_joined_as_stable_diffusion_3_joins_them(folder, clips):
    """StableDiffusion3Pipeline.encode_prompt: two CLIPs by width, zeros up to T5's width, then T5's tokens; both pooled."""
    home, ((large, words), (giant, other)) = clips
    parts = {"text_encoder": large, "text_encoder_2": giant, "tokenizer": words, "tokenizer_2": other}
    t5 = {"text_encoder_3": their_t5(256), "tokenizer_3": t5_tokenizer()}
    pipe = StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **parts, **t5)
    pipe.tokenizer_max_length = 16
    args = {"prompt_2": None, "prompt_3": None, "device": "cpu", "max_sequence_length": LENGTH}
    tokens, null, vector, null_vector = pipe.encode_prompt(CAPTIONS, **args)
    before = {"layers": [-2], "final_norm": False}
    texts = Texts({name: clip(home, name, **before) for name in ("large", "giant")}, width=256)
    conditioner = Conditioner({"text": texts, "t5": Language(str(folder), length=LENGTH, padding="attended")})
    told, untold = conditioner({"caption": CAPTIONS}), conditioner({"caption": CAPTIONS}, only=())
    assert conditioner.widths == Widths(tokens=256, vector=48 + 112) and told.mask is None
    assert told.tokens.shape == (4, 16 + LENGTH, 256)
    for a, b in ((told.tokens, tokens), (told.vector, vector), (untold.tokens, null), (untold.vector, null_vector)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_conditions_joined_as_flux_joins_them(folder, tmp_path):
    """FluxPipeline.encode_prompt: CLIP's pooled vector, before any projection, and T5's tokens, padding and all."""
    theirs, words = their_text(), their_tokenizer(tmp_path / "words")
    pipe = FluxPipeline(None, None, theirs, words, their_t5(256), t5_tokenizer(), None)
    pipe.tokenizer_max_length = 16
    tokens, vector, _ = pipe.encode_prompt(CAPTIONS, device="cpu", max_sequence_length=LENGTH)
    as_open_clip(theirs, tmp_path / "large")
    t5 = Language(str(folder), length=LENGTH, padding="attended")
    conditioner = Conditioner({"text": clip(tmp_path, "large", layers=[]), "t5": t5})
    told = conditioner({"caption": CAPTIONS})
    assert conditioner.widths == Widths(tokens=256, vector=64)
    torch.testing.assert_close(told.tokens, tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(told.vector, vector, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_vector_before_its_projection(clips):
    home, ((large, _), _) = clips
    text = clip(home, "large", layers=[], projected=False)
    ids = text.ids(CAPTIONS)
    pooled = large(ids, output_hidden_states=True).hidden_states
    norm = dict(large.named_modules())
    norm = norm.get("text_model.final_layer_norm", norm.get("final_layer_norm"))
    ends = (ids == 49407).int().argmax(1)
    torch.testing.assert_close(text(CAPTIONS, no(4)).vector, norm(pooled[-1])[torch.arange(4), ends], atol=1e-5, rtol=1e-4)
    assert text.widths == Widths(vector=64) and text(CAPTIONS, no(4)).tokens is None
    with pytest.raises(ValueError, match=r"layers=\[\]: wanted .* or none, with pooled=true"):
        Text(f"local-dir:{home}/large", layers=[])


@torch.no_grad()
def test_padding_is_masked_as_pixart_and_prx_have_it(tmp_path):
    """PRXPipeline's embeddings: right padding, masked in the tower too; here what is padding is zeros."""
    save_qwen(tmp_path)
    text = Language(str(tmp_path), length=20)
    tokenizer = byte_tokenizer()
    pipe = PRXPipeline(None, None, text.tower.model, tokenizer)
    captions = [*CAPTIONS[:2], "cats with tears of joy"]
    tokens, mask, _, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False, tokenizer_max_length=20)
    told = text(captions, no(3))
    assert torch.equal(told.mask[[0, 2]], mask[[0, 2]]) and told.mask[1].sum() == 1, "an empty one says one token"
    torch.testing.assert_close(told.tokens[[0, 2]], (tokens * mask[..., None])[[0, 2]], atol=1e-5, rtol=1e-4)


def test_a_hidden_layer_is_chosen(folder):
    every = [Language(str(folder), layer=i, length=8)(CAPTIONS, no(4)).tokens for i in (0, 2, -2, -1)]
    assert torch.equal(every[1], every[2]) and not torch.equal(every[0], every[1]) and not torch.equal(every[2], every[3])
    with pytest.raises(ValueError, match=r"language\.layer=4: wanted one of this tower's, 0 to 3 or -1 to -4"):
        Language(str(folder), layer=4)


@torch.no_grad()
def test_what_a_caption_says_depends_on_nothing_beside_it(folder):
    """Masked, it is the same in any batch and at any length that holds it; dropped, it is the empty one, or zeros."""
    text, longer = (Language(str(folder), length=n) for n in (LENGTH, 64))
    told = text(CAPTIONS, torch.tensor([False, False, True, False]))
    alone = longer(CAPTIONS[:1], no(1))
    assert alone.mask.sum() == told.mask[0].sum() == 4 and told.tokens.shape == (4, LENGTH, 256)
    torch.testing.assert_close(alone.tokens[0, :LENGTH], told.tokens[0], atol=1e-5, rtol=1e-4)
    assert not told.tokens[0, 4:].any() and not told.tokens[~told.mask].any()
    assert torch.equal(told.mask[2], told.mask[1])
    torch.testing.assert_close(told.tokens[2], told.tokens[1])
    zeros = Language(str(folder), length=LENGTH, dropped="zeros", padding="attended")(
        CAPTIONS, torch.tensor([True] + [False] * 3)
    )
    assert not zeros.tokens[0].any() and zeros.tokens[1].any() and zeros.mask is None


@torch.no_grad()
def test_a_tower_in_bfloat16_is_one_to_its_rounding(folder):
    text, half = (Language(str(folder), length=LENGTH, precision=p) for p in ("float32", "bfloat16"))
    a, b = (t(CAPTIONS, no(4)) for t in (text, half))
    assert half.tower.shared.weight.dtype == torch.bfloat16 and b.tokens.dtype == torch.float32
    assert (a.tokens - b.tokens).square().mean() < 1e-3 * a.tokens.square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text(CAPTIONS, no(4)).tokens, a.tokens), "whatever training computes in"


def test_captions_that_are_cut_are_counted_and_said(folder):
    text = Language(str(folder), length=4).train()
    text(["a red fox", "a red fox cat", "a fox", "", "cat " * 9], torch.tensor([False] * 4 + [True]))
    assert (text.cut.seen, text.cut.cut, text.cut.longest) == (3, 1, 5)
    text.eval()(CAPTIONS, no(4))
    assert re.search(r"1 of the first 3 captions are longer than the 4 tokens .* the longest 5", str(text.cut))
    with pytest.warns(UserWarning, match=r"7 tokens do not fit into 4; cut off: 'with a cat'"):
        assert text.read("caption", ["a red fox with a cat"], (8, 8)) == ["a red fox with a cat"]


def test_towers_that_are_wider_than_they_may_are_refused(clips):
    home, _ = clips
    with pytest.raises(ValueError, match=r"condition\.text\.width=100: the towers' tokens are 192 wide together"):
        Texts({name: clip(home, name) for name in ("large", "giant")}, width=100)
    assert isinstance(Texts({"large": clip(home, "large")}, width=100), nn.Module)


def test_a_model_at_rest_takes_its_language_model_along(tmp_path):
    """In pieces, with its tokenizer elsewhere."""
    save_t5(tmp_path / "home" / "tower", their_t5(), max_shard_size="40KB")
    (tmp_path / "home" / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "home" / "tower" / name).rename(tmp_path / "home" / "words" / name)
    settings = {"model": f"{tmp_path}/home/tower", "tokenizer": f"{tmp_path}/home/words"}
    recipe = {"condition": {"t5": {"_target_": "ldm.condition.language.Language", **settings}}}
    said = Language(**settings)(CAPTIONS, no(4))
    kept = with_parts(recipe, tmp_path / "rest")["condition"]["t5"]
    assert (kept["model"], kept["tokenizer"]) == ("./condition.t5", "./condition.t5.tokenizer")
    shutil.rmtree(tmp_path / "home")
    again = from_parts(kept, tmp_path / "rest")
    assert torch.equal(Language(again["model"], tokenizer=again["tokenizer"])(CAPTIONS, no(4)).tokens, said.tokens)


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_cached_captions_of_a_t5_say_what_it_says(folder, tmp_path, padding):
    """Of masked ones the shards keep the spoken tokens alone; read again, they are to the bit what the tower says."""
    text = Language(str(folder), length=LENGTH, padding=padding)
    save_null(text, tmp_path)
    kept = spoken_only(text, CAPTIONS)
    told = text(CAPTIONS, torch.tensor([False, False, True, False]))
    lengths = [len(row["text.tokens.npy"]) for row in kept]
    assert lengths == ([4, 1, 13, LENGTH] if padding == "masked" else [LENGTH] * 4)
    batch = {"caption": CAPTIONS}
    for member in kept[0]:
        batch[f"caption_{member.split('.')[1]}"] = pad_sequence([row[member] for row in kept[:3]], batch_first=True)
    cache = CachedText(partial(Language, str(folder), length=LENGTH, padding=padding), str(tmp_path), stands_for="t5")
    said = cache(cache.derive({**batch, "caption": CAPTIONS[:3]}, Draw(0, torch.arange(3), 3))["caption"], no(4)[:3])
    wanted = text(CAPTIONS, no(4))
    assert torch.equal(said.tokens, wanted.tokens[:3]) and told.tokens.shape[1] == said.tokens.shape[1]
    assert padding == "attended" or torch.equal(said.mask, wanted.mask[:3])
    assert cache.widths == text.widths and not cache.kept


def test_texts_beside_each_other_tell_what_each_does():
    class Said(Condition):
        key, rate, widths, unreached, taught = "caption", 0.1, Widths(vector=2), ("tower",), ("<fox>",)

    both = Together({"one": Said(), "other": Said()})
    assert both.unreached == ("members.one.tower", "members.other.tower") and both.taught == ("<fox>",)
