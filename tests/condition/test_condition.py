"""What a model is told: joining, dropping, and the text tower against open_clip's own encoder."""

import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.backbone.unet import UNet
from ldm.build import build, load_model
from ldm.command.subject import Subject
from ldm.compose import compose_config
from ldm.condition.bert import Bert
from ldm.condition.cached_text import CachedText, embed, save_null, spoken_only
from ldm.condition.label import Label
from ldm.condition.number import Number
from ldm.condition.text import Text, Texts, whitening
from ldm.condition.transcript import Transcript
from ldm.conditioner import Conditioner
from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards
from ldm.drawing.request import read_request
from ldm.files.folder import load_tensors, save_model, save_tensors, with_parts, write_json
from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.model import LatentModel
from ldm.types import Cond, Draw, Widths

NAMES = ["red apple", "fox", "cat face with tears of joy"]


@pytest.fixture
def text(clip_folder):
    return Text(f"local-dir:{clip_folder}", pooled=True)


def no(count):
    return torch.zeros(count, dtype=torch.bool)


def test_last_layer_and_pooled_vector_are_open_clips(text, clip_folder):
    import open_clip

    clip = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    ids = text.tokenizer(NAMES)
    cond = text(NAMES, no(3))
    torch.testing.assert_close(cond.vector, clip.encode_text(ids))
    end = cond.tokens[torch.arange(3), ids.argmax(1)] @ clip.text_projection
    torch.testing.assert_close(end, clip.encode_text(ids))
    assert cond.mask.sum(1).tolist() == [(i > 0).sum().item() for i in ids]


def test_captions_that_are_no_texts_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"found a dict: \{'caption': 'a'\}\. Name the member .* data\.fields\.caption=txt"):
        text(["a", {"caption": "a"}], no(2))


def test_a_dropped_caption_is_the_empty_prompt(text):
    told = text(NAMES, torch.tensor([False, True, False]))
    empty = text(["", "", ""], no(3))
    torch.testing.assert_close(told.vector[1], empty.vector[1])
    assert not torch.allclose(told.vector[0], empty.vector[0])


def as_transformers(folder, gelu, context=12):
    """The folder's text tower in transformers' CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    weights = load_tensors(folder / "open_clip_model.safetensors")
    (width, embed), vocab = weights["text_projection"].shape, len(weights["token_embedding.weight"])
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=vocab,
        projection_dim=embed,
        max_position_embeddings=context,
        hidden_act=gelu,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        **sizes,
    )
    twin = CLIPTextModelWithProjection(config).eval()
    theirs = {k.removeprefix("text_model."): v for k, v in twin.state_dict().items()}
    theirs["text_projection.weight"].copy_(weights["text_projection"].T)
    theirs["embeddings.token_embedding.weight"].copy_(weights["token_embedding.weight"])
    theirs["embeddings.position_embedding.weight"].copy_(weights["positional_embedding"])
    for kind in ("weight", "bias"):
        theirs[f"final_layer_norm.{kind}"].copy_(weights[f"ln_final.{kind}"])
        for i in range(2):
            ours, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for name, part in zip("qkv", weights[f"{ours}.attn.in_proj_{kind}"].chunk(3)):
                theirs[f"{layer}.self_attn.{name}_proj.{kind}"].copy_(part)
            names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            for a, b in (names | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
                theirs[f"{layer}.{b}.{kind}"].copy_(weights[f"{ours}.{a}.{kind}"])
    return twin


@pytest.fixture
def quick_folder(clip_folder, tmp_path):
    """The same CLIP with OpenAI's activation, and its text half alone."""
    import json

    config = json.loads((clip_folder / "open_clip_config.json").read_text())
    config["model_cfg"] |= {"quick_gelu": True}
    write_json(config, tmp_path / "quick" / "open_clip_config.json")
    weights = load_tensors(clip_folder / "open_clip_model.safetensors")
    text = {k: v for k, v in weights.items() if not k.startswith("visual.")}
    save_tensors(text, tmp_path / "quick" / "open_clip_model.safetensors")
    return tmp_path / "quick"


LONG = [*NAMES, "", " ".join(["word"] * 40)]


@pytest.mark.parametrize("padding", [49407, 0])
@torch.no_grad()
def test_stable_diffusions_text_is_transformers(quick_folder, padding):
    """Stable Diffusion 1: the last layer, normed, padded with the end token; 2: the one before it, padded with 0."""
    layer = -1 if padding else -2
    text = Text(f"local-dir:{quick_folder}", layers=[layer], padding=padding, pooled=True)
    twin, ids = as_transformers(quick_folder, "quick_gelu"), text.ids(LONG)
    assert ids[3].tolist() == [49406, 49407] + [padding] * 10 and ids[4].tolist()[-1] == 49407
    out, cond = twin(ids, output_hidden_states=True), text(LONG, no(5))
    state = out.hidden_states[layer]
    norm = twin.final_layer_norm if hasattr(twin, "final_layer_norm") else twin.text_model.final_layer_norm
    torch.testing.assert_close(cond.tokens, norm(state), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cond.vector, out.text_embeds, atol=1e-5, rtol=1e-4)
    assert cond.mask is None


@torch.no_grad()
def test_two_towers_are_stable_diffusion_xls(clip_folder, quick_folder):
    """The layers before the last, not normed, side by side; the second tower's pooled vector; dropped, zeros."""
    settings = {"layers": [-2], "final_norm": False, "dropped": "zeros"}
    large = Text(f"local-dir:{quick_folder}", padding=49407, **settings)
    giant = Text(f"local-dir:{clip_folder}", padding=0, pooled=True, **settings)
    texts = Texts({"large": large, "giant": giant})
    first = as_transformers(quick_folder, "quick_gelu")(large.ids(LONG), output_hidden_states=True)
    second = as_transformers(clip_folder, "gelu")(giant.ids(LONG), output_hidden_states=True)
    cond = texts(LONG, torch.tensor([False, True, False, False, False]))
    tokens = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=2)
    keep = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(cond.tokens[keep], tokens[keep], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cond.vector[keep], second.text_embeds[keep], atol=1e-5, rtol=1e-4)
    assert not cond.tokens[1].any() and not cond.vector[1].any() and cond.mask is None
    assert texts.widths == Widths(tokens=32, vector=16) and texts.frozen == ("towers.large.tower", "towers.giant.tower")


def test_towers_of_different_context_are_refused(text):
    other = Text.__new__(Text)
    nn.Module.__init__(other)
    other.widths, other.tower = text.widths, nn.Module()
    other.tower.context_length = 77
    with pytest.raises(ValueError, match=r"different lengths, \{'a': 12, 'b': 77\}"):
        Texts({"a": text, "b": other})


def test_padding_does_not_matter(text):
    net = UNet(4, text.widths, width=16, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    cond = text(NAMES, no(3))
    noisy = Cond(cond.vector, torch.where(cond.mask[..., None], cond.tokens, 100.0), cond.mask)
    x, level = torch.randn(3, 4, 4, 4), torch.rand(3)
    torch.testing.assert_close(net(x, level, cond), net(x, level, noisy))
    other = Cond(cond.vector, cond.tokens.flip(0), cond.mask)
    assert not torch.allclose(net(x, level, cond), net(x, level, other), atol=1e-3)


def test_layers_join_by_width_and_whiten(clip_folder, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (folder / name).write_bytes((clip_folder / name).read_bytes())
    plain = Text(f"local-dir:{folder}", layers=[0, -1], pooled=True)
    cond = plain(NAMES, no(3))
    rows, width = cond.tokens[cond.mask], plain.widths.tokens // 2
    stats = {"pooled": cond.vector, "layer.0": rows[:, :width], "layer.1": rows[:, :width], "layer.2": rows[:, width:]}
    table = {f"{k}.mean": v.mean(0) for k, v in stats.items()}
    table |= {f"{k}.covariance": torch.cov(v.T) for k, v in stats.items()}
    save_tensors(table, folder / "statistics.safetensors")
    told = Text(f"local-dir:{folder}", layers=[0, -1], pooled=True, whiten=True)(NAMES, no(3))
    for x in (told.tokens[told.mask], told.vector):
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), atol=1e-3, rtol=0)
    mean, covariance = torch.randn(5), torch.cov(torch.randn(5, 50))
    _, mix = whitening(mean, covariance, ridge=0.0)
    torch.testing.assert_close(mix @ covariance @ mix, torch.eye(5), atol=1e-4, rtol=0)


def test_missing_tower_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python train\.py experiment=emoji/clip (runs=\S+ )?run_id=.*condition\.text"):
        Text(f"local-dir:{tmp_path}/none")


def test_missing_statistics_name_the_setting(clip_folder, tmp_path):
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"condition\.text\.whiten=false"):
        Text(f"local-dir:{tmp_path}", whiten=True)


@pytest.mark.parametrize("layers", [[7], [-4], []])
def test_a_layer_that_is_not_there_is_named(clip_folder, layers):
    with pytest.raises(ValueError, match=r"condition\.text\.layers=\[.*0 to 2 or -1 to -3"):
        Text(f"local-dir:{clip_folder}", layers=layers)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ValueError, match=rf"condition\.label\.rate={rate}.*0 \(never dropped\) to 1"):
        Conditioner({"label": Label(10, 8, rate=rate)})


def test_dropping_depends_on_position_alone():
    conditioner = Conditioner({"label": Label(10, 8, rate=0.5)})
    labels, position = torch.arange(8), torch.arange(8) + 100
    whole = conditioner({"label": labels}, Draw(0, position, 8)).tokens
    halves = [conditioner({"label": labels[r]}, Draw(0, position[r], 8)).tokens for r in (slice(0, 4), slice(4, 8))]
    assert torch.equal(whole, torch.cat(halves))


def test_dropping_follows_its_rate():
    draw = Draw(3, torch.arange(4000), 4000)
    conditioner = Conditioner({"label": Label(2, 4, rate=0.25)})
    tokens = conditioner({"label": torch.zeros(4000, dtype=torch.int64)}, draw).tokens[:, 0]
    share = (tokens == conditioner.embedders["label"].table.weight[2]).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_rate_zero_is_never_dropped_not_in_the_null_either():
    conditioner = Conditioner({"a": Label(4, 8, key="a", rate=0.0), "b": Label(4, 8, key="b", rate=0.5)})
    batch = {"a": torch.tensor([1]), "b": torch.tensor([1])}
    null, told = conditioner(batch, only=()), conditioner(batch)
    assert torch.equal(null.tokens[:, 0], told.tokens[:, 0])
    assert not torch.equal(null.tokens[:, 1], told.tokens[:, 1])
    assert torch.equal(conditioner(batch, only=("b",)).tokens, told.tokens)


def test_null_forgets_and_order_is_kept():
    conditioner = Conditioner({"label": Label(10, 8)})
    a, b = ({"label": torch.tensor([i, i + 1])} for i in (0, 5))
    assert torch.equal(conditioner(a, only=()).tokens, conditioner(b, only=()).tokens)
    assert not torch.equal(conditioner(a).tokens, conditioner(b).tokens)


def test_what_is_missing_is_named():
    conditioner = Conditioner({"label": Label(10, 8)})
    with pytest.raises(ValueError, match=r"'label' reads the field 'label'.*only \['image'\]"):
        conditioner({"image": torch.zeros(1)})
    with pytest.raises(ValueError, match="not \\['txet'\\]"):
        conditioner({"label": torch.zeros(1)}, only=("txet",))
    with pytest.raises(ValueError, match="this model knows 0 to 9"):
        conditioner({"label": torch.tensor([10])})


def test_a_class_may_be_asked_by_name_and_be_a_vector():
    label = Label(["Animals & Nature", "Activities", "Food"], 4, slot="vector")
    assert label.read("label", ["food", "2", 0, "Anim", "Activities"], (1, 1)).tolist() == [2, 2, 0, 0, 1]
    assert torch.equal(label(torch.tensor([1, 2]), torch.tensor([False, True])).vector, label.table.weight[[1, 3]])
    assert label.widths == Widths(vector=4)
    for word, count in (("A", 2), ("Fod", 0)):
        with pytest.raises(ValueError, match=rf"ask\.label={word} .* {count} classes.*Animals & Nature, Activities, Food"):
            label.read("label", [word], (1, 1))


SIZES = {"original_height": "height", "original_width": "width", "crop_top": 0}


def test_numbers_are_stable_diffusion_xls():
    """diffusers' Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0), written out."""
    number, values = Number(SIZES, width=6), torch.tensor([512.0, 3.0])
    vector = number([values, values + 1, [0, 7]], no(2)).vector
    freqs = 10_000.0 ** -(torch.arange(3) / 3)
    for i, row in enumerate((values, values + 1, torch.tensor([0.0, 7.0]))):
        angle = row[:, None] * freqs
        torch.testing.assert_close(vector[:, 6 * i : 6 * i + 6], torch.cat((angle.cos(), angle.sin()), 1), atol=1e-4, rtol=0)
    assert number.widths == Widths(vector=18) and not number([values] * 3, torch.tensor([True, False])).vector[0].any()


def test_numbers_are_read_from_the_records_and_told_in_the_null():
    conditioner = Conditioner({"number": Number(SIZES, width=6)})
    record = {"original_height": 64, "original_width": 48.0, "crop_top": 3, "url": "x", "ok": True}
    batch = {"json": [record, record | {"crop_top": 5}]}
    told = conditioner(batch)
    direct = conditioner({"original_height": [64, 64], "original_width": [48, 48], "crop_top": [3, 5]})
    assert torch.equal(told.vector, direct.vector) and torch.equal(told.vector, conditioner(batch, only=()).vector)
    with pytest.raises(
        ValueError, match=r"'original_width'.*found None; the numbers there are \['crop_top', 'original_height'\]"
    ):
        conditioner({"json": [{k: v for k, v in record.items() if k != "original_width"}]})
    cropless = {k: v for k, v in record.items() if k != "crop_top"}  # as img2dataset writes it: where nothing is cropped, 0
    assert conditioner.embedders["number"].derive({"json": [cropless]}, None)["crop_top"] == [0.0]
    assert [conditioner.embedders["number"].unasked(f, (32, 48)) for f in SIZES] == [[32.0], [48.0], [0.0]]


def test_captions_of_a_file_are_judged_at_the_size_drawn(text, tmp_path):
    """Numbers that nobody says are those of the pictures, also where `resolution` is left to the data."""
    (tmp_path / "prompts.txt").write_text("fox\ncat\n")
    config = compose_config("evaluate", [f"prompts={tmp_path}/prompts.txt", "count=2", "data.size=48"])
    config = OmegaConf.to_container(config, resolve=True)
    subject = Subject(config, tmp_path)
    subject.model = SimpleNamespace(conditioner=Conditioner({"text": text, "number": Number(SIZES, width=6)}))
    assert subject._requests().ask["original_height"].tolist() == [48.0, 48.0]


def test_conditions_join():
    a = Cond(vector=torch.ones(2, 4), tokens=torch.ones(2, 3, 4), spatial=torch.ones(2, 1, 5, 5))
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    b = Cond(vector=torch.zeros(2, 6), tokens=torch.zeros(2, 5, 4), mask=hidden, spatial=torch.ones(2, 2, 5, 5))
    both = a + b
    assert both.vector.shape == (2, 10) and both.tokens.shape == (2, 8, 4) and both.spatial.shape == (2, 3, 5, 5)
    assert both.mask.tolist() == [[True] * 3 + [False] * 5] * 2
    assert (Cond() + b).mask is b.mask
    assert a.stack(a).tokens.shape == (4, 3, 4)
    assert (Widths(1, 8, 2) + Widths(3, 8, 4)) == Widths(4, 8, 6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="widths, 8 and 16"):
        Widths(tokens=8) + Widths(tokens=16)
    with pytest.raises(ValueError, match="cannot share a batch"):
        Cond(vector=torch.ones(1, 2)).stack(Cond())


class Told:
    """A model whose denoiser multiplies by what it is told, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def denoiser(self, x_t, t, cond):
        self.calls += 1
        return x_t * cond.vector[:, :1, None, None]

    def condition(self, ask, only=None):
        value = 5.0 if only == () else ask["caption"][0]
        return Cond(vector=torch.full((3, 4), value))


X, T = torch.randn(3, 1, 2, 2), torch.tensor(0.5)


def test_guidance_at_one_is_no_guidance_to_the_bit():
    model = Told()
    denoise = CFG(1.0)(model, {"caption": [2.0]})
    assert torch.equal(denoise(X, T), Unguided()(model, {"caption": [2.0]})(X, T))
    assert model.calls == 2


@pytest.mark.parametrize("scale, factor", [(0.0, 5.0), (2.0, -1.0), (3.0, -4.0)])
def test_guidance_is_linear_in_its_scale(scale, factor):
    torch.testing.assert_close(CFG(scale)(Told(), {"caption": [2.0]})(X, T), factor * X)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_negative_request_takes_the_place_of_what_is_not_told(rate):
    conditioner = Conditioner({"a": Label(4, 8, key="a", rate=rate), "b": Label(4, 8, key="b")})
    ask, no = {"a": torch.tensor([1]), "b": torch.tensor([2])}, torch.tensor([3])
    asked = ask | {"negative.a": no}
    assert torch.equal(conditioner(asked).tokens, conditioner(ask).tokens)
    assert torch.equal(conditioner(asked, only=("a",)).tokens, conditioner(ask, only=("a",)).tokens)
    assert torch.equal(conditioner(asked, only=()).tokens, conditioner(ask | {"a": no}, only=("a",)).tokens)


# ---- embeddings that come with the shards


def cached(clip_folder, folder, **settings):
    text = Text(f"local-dir:{clip_folder}", pooled=True, layers=(0, -1), **settings)
    save_null(text, folder)
    load = partial(Text, f"local-dir:{clip_folder}", pooled=True, layers=(0, -1), **settings)
    return text, CachedText(load, str(folder))


@pytest.mark.parametrize("settings", [{}, {"padding": 0, "dropped": "zeros"}])
def test_cached_captions_say_what_their_tower_does_and_training_never_reads_it(clip_folder, tmp_path, settings):
    """Through shards, as float16: to its rounding, dropped ones too."""
    text, cache = cached(clip_folder, tmp_path / "text", **settings)
    made = spoken_only(text, NAMES)
    rows = [{m: (x.half() if x.is_floating_point() else x).numpy() for m, x in row.items()} for row in made]
    lengths = [len(row["text.tokens.npy"]) for row in rows]
    assert lengths == [12] * 3 if settings else lengths == text(NAMES, no(3)).mask.sum(1).tolist(), "only what is spoken"
    samples = [{"__key__": str(i), "txt": name, "json": {}, **row} for i, (name, row) in enumerate(zip(NAMES, rows))]
    write_shards(samples, tmp_path / "shards")
    fields = {"caption": "txt"} | {f"caption_{member.split('.')[1]}": member for member in made[0]}
    data = Shards(str(tmp_path / "shards"), fields=fields, batch=3)
    batch = data.on_after_batch_transfer(data.rows("train", range(3)))
    draw, drop = Draw(0, torch.arange(3), 3), torch.tensor([False, True, False])
    told = cache(cache.derive(batch, draw)["caption"], drop)
    wanted = text(NAMES, drop)
    spoken = slice(None) if wanted.mask is None else wanted.mask
    assert told.tokens.shape == wanted.tokens.shape
    torch.testing.assert_close(told.tokens[spoken], wanted.tokens[spoken], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(told.vector, wanted.vector, atol=2e-3, rtol=2e-3)
    assert (told.mask is None and wanted.mask is None) or torch.equal(told.mask, wanted.mask)
    assert cache.widths == text.widths and not cache.kept and not list(cache.parameters()) and not cache.state_dict()
    cond = Conditioner({"text": cache})(batch, draw)
    assert cond.tokens.shape == wanted.tokens.shape and not cache.kept
    assert torch.equal(cache(cache.read("caption", NAMES, (8, 8)), drop).tokens, wanted.tokens) and cache.kept


def test_a_model_of_cached_captions_is_asked_by_prompts(clip_folder, tmp_path):
    text, cache = cached(clip_folder, tmp_path)
    model = LatentModel(torch.nn.Identity(), Conditioner({"cached_text": cache}), torch.nn.Identity())
    ask, count = read_request({"prompt": NAMES}, model)
    assert count == len(NAMES) and torch.equal(
        model.condition(ask).tokens, text(NAMES, torch.zeros(count, dtype=torch.bool)).tokens
    )


def test_cached_captions_of_another_tower_or_none_are_refused(clip_folder, tmp_path):
    _, cache = cached(clip_folder, tmp_path)
    draw = Draw(0, torch.arange(3), 3)
    with pytest.raises(
        ValueError, match=r"data\.fields=\{caption_tokens: text\.tokens\.npy.*only \['caption'\]; condition=\[text\]"
    ):
        cache.derive({"caption": NAMES}, draw)
    narrow = {f"caption_{m.split('.')[1]}": v for m, v in embed(Text(f"local-dir:{clip_folder}", pooled=True), NAMES).items()}
    with pytest.raises(ValueError, match=r"tokens are of shape .* the null's of .*another text tower"):
        cache.derive(narrow, draw)
    other = CachedText(partial(Text, f"local-dir:{clip_folder}", pooled=True, layers=(-1, 0)), str(tmp_path))
    with pytest.raises(ValueError, match=r"cached_text\.load makes another text than the shards'"):
        other.read("caption", ["fox"], (8, 8))
    with pytest.raises(FileNotFoundError, match=r"no null\.safetensors in .*condition\.cached_text\.path=FOLDER"):
        CachedText(partial(Text, "x"), str(tmp_path / "nowhere"))


def test_a_model_at_rest_takes_its_null_and_its_tower_along(clip_folder, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(clip_folder, home / "clip")
    text, _ = cached(home / "clip", home / "text")
    load = {"_target_": "ldm.condition.text.Text", "_partial_": True, "model": f"local-dir:{home}/clip"}
    condition = {"_target_": "ldm.condition.cached_text.CachedText", "path": f"{home}/text"}
    condition["load"] = load | {"layers": [0, -1], "pooled": True}
    config = compose_config("train", ["backbone.width=8", "backbone.groups=4", "backbone.mult=[1]", "backbone.depth=[1]"])
    recipe = OmegaConf.to_container(config, resolve=True)["training"]["model"]
    recipe |= {"autoencoder": {"_target_": "ldm.autoencoder.identity.Identity"}, "condition": {"text": condition}}
    recipe["backbone"]["heads"] = 2
    model = build(recipe).eval()
    save_model(model.state_dict(), with_parts(recipe, tmp_path / "rest"), tmp_path / "rest")
    shutil.rmtree(home)
    told = load_model(tmp_path / "rest").condition({"caption": NAMES})
    assert torch.equal(told.tokens, text(NAMES, no(3)).tokens)


def test_captions_that_are_cut_are_counted_by_readers_that_are_trained_too(text, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    bert = Bert(str(tmp_path), width=8, depth=1, heads=1, head_width=8, length=7)
    for reader in (bert, Transcript(width=8, depth=1, heads=1, length=7)):
        reader.eval()(["a " * 20], no(1))
        reader.train()(["a " * 5, "a " * 6, "b a " * 20, ""], no(4))
        assert (reader.cut.seen, reader.cut.cut, reader.cut.longest) == (3, 2, 40), type(reader)
    with pytest.warns(UserWarning, match="9 words do not fit into 5"):
        bert.read("caption", ["a " * 9], (8, 8))
    before = text.cut.seen
    text.cut.always = True
    text.eval()(["a " * 20], no(1))
    text.cut.always = False
    assert text.cut.seen == before + 1, "as precompute.py counts"


def test_captions_that_are_cut_in_training_are_counted(text):
    """12 tokens, of which the ends take 2: ten words fit, eleven do not; what is dropped, or read to draw, counts not."""
    ten, eleven, many = ("a " * n for n in (10, 11, 25))
    drop = torch.tensor([False, False, False, True])
    before = (text.cut.seen, text.cut.cut)
    text.eval()([ten, eleven, many, many], drop)
    assert (text.cut.seen, text.cut.cut) == before
    text.train()([ten, eleven, many, many], drop)
    text.eval()
    assert (text.cut.seen - before[0], text.cut.cut - before[1], text.cut.longest) == (3, 2, 25)
    assert re.search(r"2 of the first 3 captions are longer than the 10 tokens .* the longest 25", str(text.cut))


def test_a_usual_number_is_told_where_no_record_says_it():
    """A guidance scale, in pictures with captions alone: not so a picture's size, which nothing but a record knows."""
    number = Number({"guidance": 3.5, "original_height": "height"}, width=8, scale=1000.0)
    assert number.derive({"position": torch.arange(3)}, None) == {"guidance": [3.5] * 3}
    assert number.derive({"position": torch.arange(3), "guidance": [1.0] * 3}, None) == {}
