"""Language models that read captions, against transformers': hidden states, tokens, files, and what is refused."""

import json

import pytest
import torch

from helpers.language import VOCABULARY, save_qwen, save_t5, t5_tokenizer, their_t5
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.tower.counter import Counter
from ldm.tower.language import folder_of, load_language, load_words, truncated
from ldm.tower.t5 import COMMON, SIZES, build_t5
from ldm.tower.words import from_sentencepiece

CAPTIONS = ["a red fox", "", "cats  with\ttears of joy, été ﬁne 日本", "<extra_id_7> a</s> cat<pad>", " ".join(["apple"] * 30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("qwen"))


def tower(folder, dtype=torch.float32, pretrained=True):
    return load_language(str(folder), pretrained, dtype, "condition.t5")


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_t5_is_transformers(folder, masked):
    """All hidden states; 150 tokens pass the farthest bucket."""
    ids = torch.randint(len(VOCABULARY), (2, 150))
    mask = torch.arange(150) < torch.tensor([[150], [17]]) if masked else None
    ours = tower(folder)(ids, mask)
    theirs = their_t5()(ids, attention_mask=None if mask is None else mask.long(), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        read = slice(None) if mask is None else mask
        torch.testing.assert_close(a[read], b[read], atol=1e-5, rtol=1e-5)


def test_t5s_tokens_are_transformers(folder):
    words, theirs = load_words(str(folder), "condition.t5", True), t5_tokenizer()
    assert words.rows(CAPTIONS) == theirs(CAPTIONS).input_ids
    for length in (1, 2, 7, 64):
        cut = theirs(CAPTIONS, truncation=True, max_length=length).input_ids
        assert [words.cut(caption, length) for caption in CAPTIONS] == cut
    assert words.padding == theirs.pad_token_id
    assert truncated(words, "a red fox", 4) == (4, "") and truncated(words, "a red fox with a cat", 4) == (7, "with a cat")


def test_a_sentencepiece_file_is_read_without_its_package(folder, tmp_path):
    """A spiece.model as that package writes it, with a table of characters, is the tokenizer that transformers makes of it."""
    from tokenizers import normalizers
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    proto = ModelProto()
    for i, (word, score) in enumerate(VOCABULARY):
        proto.pieces.add(piece=word, score=score, type=3 if i < 2 else 2 if i == 2 else 1)
    proto.trainer_spec.model_type, proto.trainer_spec.vocab_size = 1, len(VOCABULARY)
    proto.normalizer_spec.name = "nmt_nfkc"
    ours = from_sentencepiece(proto.SerializeToString())
    assert [row.ids for row in ours.encode_batch(CAPTIONS)] == t5_tokenizer()(CAPTIONS).input_ids
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    assert load_words(str(tmp_path), "condition.t5", True).rows(CAPTIONS) == t5_tokenizer()(CAPTIONS).input_ids
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString()[:-100])
    with pytest.raises(ValueError, match=r"spiece\.model is no whole tokenizer"):
        load_words(str(tmp_path), "condition.t5", True)
    assert ours.normalizer is None or isinstance(ours.normalizer, normalizers.Precompiled)


@pytest.mark.parametrize("how", ["pieces", "fp16", "bin", "whole T5", "tied"])
def test_weights_are_read_in_whatever_files_they_lie(folder, tmp_path, how):
    theirs = their_t5()
    if how == "fp16":
        theirs = theirs.half()
    if how == "bin":
        save_t5(tmp_path, theirs)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    elif how in ("whole T5", "tied"):
        save_t5(tmp_path, theirs)
        weights = load_tensors(tmp_path / "model.safetensors")
        weights |= {"decoder.final_layer_norm.weight": torch.ones(32), "lm_head.weight": torch.ones(2, 32)}
        if how == "tied":
            weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
        save_tensors(weights, tmp_path / "model.safetensors")
    else:
        save_t5(tmp_path, theirs, **({"max_shard_size": "40KB"} if how == "pieces" else {"variant": "fp16"}))
        assert not (tmp_path / "model.safetensors").exists()
    own, wanted = tower(tmp_path).state_dict(), tower(folder).state_dict()
    assert own.keys() == wanted.keys() == their_t5().state_dict().keys() - {"encoder.embed_tokens.weight"}
    for name, x in own.items():
        assert torch.equal(x, wanted[name].half().float() if how == "fp16" else wanted[name])


def test_tokens_are_counted_without_a_tower(folder, qwen, clip_folder):
    from ldm.condition.text import Text

    assert Counter(str(folder))(CAPTIONS) == [len(ids) for ids in t5_tokenizer()(CAPTIONS).input_ids]
    assert Counter(str(qwen))(["été", ""]) == [5, 0] and Counter()([]) == []
    text = Text(f"local-dir:{clip_folder}")
    assert Counter()(["a red fox"]) == [int((text.ids(["a red fox"]) != 0).sum())]


def test_published_sizes():
    """4.76 billion numbers, as in Stable Diffusion 3's text_encoder_3; no file is read."""
    with torch.device("meta"):
        xxl = load_language("google/t5-v1_1-xxl", False, torch.bfloat16, "condition.t5")
        small = build_t5(COMMON | SIZES["google/t5-v1_1-small"], "small")
    assert sum(p.numel() for p in xxl.parameters()) == 4_762_310_656 and xxl.shared.weight.dtype == torch.bfloat16
    assert sum(p.numel() for p in small.parameters()) == 35_332_800


def test_what_is_no_t5_or_not_whole_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"condition\.t5\.model=./none: there is no such folder.*hub, org/name"):
        folder_of("./none", "condition.t5.model")
    save_t5(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer in .*tokenizer\.json or spiece\.model.*condition\.t5\.tokenizer=FOLDER"
    ):
        load_words(str(tmp_path), "condition.t5", True)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_tensors(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"feed_forward_proj=relu; T5 v1\.1.*condition=\[language\]"):
        build_t5(config | {"feed_forward_proj": "relu"}, "it")
    write_json(config | {"num_layers": 4}, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"do not fit its config\.json: encoder\.block\.3"):
        tower(tmp_path)
    save_tensors({n: x.to(torch.float8_e4m3fn) for n, x in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is float8_e4m3fn, quantised numbers\. Take the bfloat16"):
        tower(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*wanted model\.safetensors"):
        tower(tmp_path)


def test_a_piece_that_is_missing_is_named(tmp_path):
    save_t5(tmp_path, max_shard_size="40KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-\d+\.safetensors: there is no such file"):
        tower(tmp_path)


# ---- any encoder of transformers


@torch.no_grad()
def test_a_language_models_hidden_states_are_transformers(qwen):
    from transformers import AutoModel, AutoTokenizer

    ours, words = tower(qwen), load_words(str(qwen), "condition.language", False)
    theirs, tokenizer = AutoModel.from_pretrained(qwen), AutoTokenizer.from_pretrained(qwen)
    told = tokenizer(CAPTIONS, padding="max_length", max_length=12, truncation=True, padding_side="right", return_tensors="pt")
    assert [words.cut(c, 12) for c in CAPTIONS] == [i[m.bool()].tolist() for i, m in zip(told.input_ids, told.attention_mask)]
    wanted = theirs(**told, output_hidden_states=True).hidden_states
    mask = told.attention_mask.bool()
    for a, b in zip(ours(told.input_ids, mask), wanted, strict=True):
        torch.testing.assert_close(a[mask], b[mask], atol=1e-5, rtol=1e-5)
    assert (ours.width, ours.depth) == (32, 3)


@torch.no_grad()
def test_the_encoder_of_a_pair_is_read_alone(tmp_path):
    """T5Gemma, which PRX reads: its decoder is left, and an encoder that was saved alone is the same."""
    from transformers import T5GemmaConfig, T5GemmaModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    part = {**sizes, "vocab_size": 64, "num_key_value_heads": 1}
    pair = T5GemmaModel(T5GemmaConfig(encoder=part, decoder=part, vocab_size=64)).eval()
    ids, mask = torch.randint(3, 60, (2, 6)), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    wanted = pair.get_encoder()(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    pair.save_pretrained(tmp_path / "pair")
    pair.get_encoder().save_pretrained(tmp_path / "alone")
    for name in ("pair", "alone"):
        for a, b in zip(tower(tmp_path / name)(ids, mask), wanted, strict=True):
            torch.testing.assert_close(a[mask], b[mask])


def test_packages_that_are_missing_are_named_with_their_pip_line(qwen, tmp_path, monkeypatch):
    import ldm.tower.language as language

    def missing(name):
        raise ImportError(name)

    (tmp_path / "config.json").write_text('{"model_type": "t5", "feed_forward_proj": "relu"}')
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no tokenizer that transformers reads"):
        load_words(str(tmp_path), "condition.language", False)
    monkeypatch.setattr(language, "import_module", missing)
    with pytest.raises(ValueError, match=r"condition\.t5 reads a model by transformers.*pip install 'transformers>=5'"):
        tower(qwen)
