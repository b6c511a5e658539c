"""What the conversion cannot read, or should not, names itself; what can be read another way is read truly."""

import json
import os
import shutil

import diffusers
import pytest
import torch

from helpers.family import of_classes, of_words, their_pipeline, their_tokenizer, unconditional
from ldm.backbone.unet import UNet
from ldm.files.folder import load_tensors, read_json, save_tensors, write_json, write_text
from ldm.interop import bundle, conditions
from ldm.interop.__main__ import main
from ldm.interop.begin import begin, weights_for
from ldm.interop.convert import describe, read, write
from ldm.interop.network import dit
from ldm.interop.part._tokens import padding as _padding
from ldm.schedule import DDPM
from ldm.types import Widths


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Stable Diffusion 1, LDM's text to picture and DiT: folders of diffusers (a), of ours (a.ldm), and single files."""
    home = tmp_path_factory.mktemp("models")
    their_pipeline("sd1", home / "words").save_pretrained(home / "sd1")
    for made in (of_words, of_classes):
        made(home / "words").save_pretrained(home / made.__name__)
    for name, layout in (("sd1", "compvis"), ("of_words", "compvis"), ("of_classes", "dit")):
        held = read(str(home / name))[0]
        write(held, home / f"{name}.ldm", "ldm", source=name)
        write(held, home / f"{name}.safetensors", layout)
    return home


def changed(models, name, tmp_path, place, change):
    """A copy of a folder, of whose file at `place` is written what `change` makes of it, or which lacks it."""
    folder = tmp_path / name
    shutil.copytree(models / name, folder, copy_function=os.link)
    path = folder / place
    if change is None:
        path.unlink()
    elif path.suffix == ".json":
        write_json(change(read_json(path)), path)
    else:
        save_tensors(change(load_tensors(path)), path)
    return str(folder)


def told_to_convert(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["", *map(str, words)])
    main()


@pytest.mark.parametrize("place", ["unet/config.json", "vae/config.json", "tokenizer/tokenizer_config.json"])
def test_a_folder_that_is_not_whole(models, tmp_path, place):
    with pytest.raises(FileNotFoundError, match=f"There is no .*{place}; its folder is not whole"):
        read(changed(models, "sd1", tmp_path, place, None))


CONFIGS = {
    "list": ("unet/config.json", lambda told: [told], r"unet/config\.json holds a list; settings by name were wanted"),
    "bare": ("unet/config.json", lambda told: {"_class_name": "UNet2DConditionModel"}, r"does not say 'down_block_types'"),
    "word": (
        "unet/config.json",
        lambda told: told | {"block_out_channels": "x"},
        r"sd1: The unet is .* with block_out_channels=x \(whole numbers above 0 in a list was wanted\)",
    ),
    "zero": (
        "text_encoder/config.json",
        lambda told: told | {"hidden_size": 0},
        r"hidden_size=0 \(a whole number above 0 was wanted\)",
    ),
    "flow": ("model_index.json", lambda told: told | {"scheduler": ["diffusers", "FlowMatch"]}, "has a FlowMatch; of diffusers'"),
    "tower": (
        "model_index.json",
        lambda told: told | {"text_encoder": ["transformers", "RobertaModel"]},
        r"text_encoder is of a RobertaModel; CLIPTextModel and CLIPTextModelWithProjection are known",
    ),
    "classes": (
        "unet/config.json",
        lambda told: told | {"num_class_embeds": 10},
        "num_class_embeds=10, which only the x4 upscaler",
    ),
    "shift": ("vae/config.json", lambda told: told | {"shift_factor": 0.1}, "says shift_factor=0.1: .* Take them out of its"),
    "trained": ("scheduler/scheduler_config.json", lambda told: told | {"trained_betas": [0.1]}, "beta_schedule=trained_betas"),
    "none": ("scheduler/scheduler_config.json", lambda told: told | {"beta_end": None}, "betas from 0.00085 to None"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_another_kind(models, tmp_path, name):
    place, change, words = CONFIGS[name]
    with pytest.raises(ValueError, match=words):
        read(changed(models, "sd1", tmp_path, place, change))


def test_linear_betas_of_its_own_are_kept(models, tmp_path):
    """`beta_schedule=linear` from 0.00085 to 0.012 is another table than DDPM's, here and back at diffusers."""
    place = "scheduler/scheduler_config.json"
    source = changed(models, "sd1", tmp_path, place, lambda told: told | {"beta_schedule": "linear", "steps_offset": 0})
    held = read(source)[0]
    assert "Noise on DDPM, betas 0.00085 to 0.012" in describe(held) and "steps_offset=0 is said" in describe(held)
    settings = {k: v for k, v in held.recipe["schedule"].items() if k != "_target_"}
    alpha, _ = DDPM(**settings)((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    write(held, tmp_path / "back", "diffusers")
    for folder in (source, tmp_path / "back"):
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": {}}], ids=["old", "new"])
@pytest.mark.parametrize("special", [{}, {"pad_token": "!"}, {"pad_token": {"content": "!"}}], ids=["none", "word", "token"])
def test_what_a_tokenizer_pads_with(tmp_path, special, decoder):
    """Stable Diffusion 2's says it in special_tokens_map.json alone, which late transformers read where the config is old."""
    peer = their_tokenizer(tmp_path)
    write_json({"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", **decoder}, tmp_path / "tokenizer_config.json")
    write_json(special, tmp_path / "special_tokens_map.json")
    assert _padding(tmp_path) == type(peer).from_pretrained(tmp_path).pad_token_id


def test_single_files_name_themselves(models, tmp_path):
    weights, gone = load_tensors(models / "sd1.safetensors"), "first_stage_model.decoder.conv_in.bias"
    for wrong, words in (
        ({n: x for n, x in weights.items() if n != gone}, f"wrong.safetensors: 1 tensors are missing, such as {gone}"),
        ({n: x for n, x in weights.items() if not n.startswith("cond")}, "wrong.safetensors: .* neither a text tower"),
        ({n: x.to(torch.int8) for n, x in weights.items()}, "weight is int8, quantised numbers"),
        ({n: x.to(torch.float8_e4m3fn) for n, x in weights.items()}, "is float8_e4m3fn, quantised numbers"),
    ):
        save_tensors(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=words):
            read(str(tmp_path / "wrong.safetensors"))
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.ckpt does not load as plain tensors \(UnpicklingError\)"):
        read(str(tmp_path / "page.ckpt"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [1", "wrong.yaml is not whole YAML"),
        ("- 1", "wrong.yaml holds a list"),
        ("a: 1", r"wrong\.yaml does not say 'model'"),
        ("model: {params: {parameterization: flow}}", "parameterization=flow; eps, v, x0 are known"),
    ],
)
def test_the_yaml_beside_a_file(models, tmp_path, text, words):
    os.link(models / "sd1.safetensors", tmp_path / "wrong.safetensors")
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read(str(tmp_path / "wrong.safetensors"))


def test_the_command_refuses_what_does_not_belong_together(models, tmp_path, monkeypatch):
    unconditional(tmp_path / "words").save_pretrained(tmp_path / "other")
    write_text("a\nb\n", tmp_path / "few" / "vocab.txt")
    words, network = models / "of_words.safetensors", models / "of_classes.safetensors"
    for told, error in (
        ([network, tmp_path / "a", "--prediction", "noise", "--autoencoder", network], "holds no autoencoder. Name one"),
        (
            [network, tmp_path / "a", "--prediction", "noise", "--autoencoder", tmp_path / "other"],
            "4 channels; its auto",
        ),
        ([words, tmp_path / "a"], "its vocabulary has 0. Say where BERT's uncased vocab.txt lies"),
        ([words, tmp_path / "a", "--vocabulary", tmp_path / "few"], "a text model of 9 words, and its vocabulary has 2"),
        ([words, tmp_path / "a", "--vocabulary", tmp_path], r"There is no .*/vocab\.txt"),
        ([models / "sd1", tmp_path / "a", "--vocabulary", tmp_path / "few"], "holds no BERT to read the words of"),
        ([models / "sd1", tmp_path / "a", "--prediction", "velocity"], "says noise by itself"),
        ([models / "sd1", words], "is a file; a model in the layout of ldm is a folder"),
    ):
        with pytest.raises(SystemExit, match=error):
            told_to_convert(monkeypatch, *told, "--to", "ldm")
    assert not (tmp_path / "a").exists()
    told_to_convert(monkeypatch, words, tmp_path / "a", "--to", "ldm", "--vocabulary", f"{models}/of_words.ldm/{bundle.WORDS}")
    assert (tmp_path / "a" / bundle.WORDS / "vocab.txt").read_bytes() == (models / "words" / "w" / "vocab.txt").read_bytes()


def test_a_network_of_another_text_tower(models, tmp_path, monkeypatch):
    """Stable Diffusion XL's U-Net in a folder of Stable Diffusion 1."""
    shutil.copytree(models / "sd1", tmp_path / "mixed", copy_function=os.link)
    shutil.rmtree(tmp_path / "mixed" / "unet")
    their_pipeline("xl", tmp_path / "words").unet.save_pretrained(tmp_path / "mixed" / "unet")
    with pytest.raises(SystemExit, match=r"the U-Net reads tokens 192 wide, condition\.text makes them 64 wide"):
        told_to_convert(monkeypatch, tmp_path / "mixed", tmp_path / "a", "--to", "ldm")


NAN = {"denoiser.backbone.out.2.bias": torch.full((4,), float("nan"))}
BROKEN = {
    "nan": ("sd1.ldm", "model.safetensors", lambda w: w | NAN, r"out\.2\.bias \(float32\) holds numbers that are not finite"),
    "nan within": ("sd1.ldm", "autoencoder/model.safetensors", lambda w: w | {"std": w["std"] / 0}, "std .* not finite"),
    "lacking": ("sd1.ldm", "model.safetensors", lambda w: dict(list(w.items())[1:]), "does not fit its config: .* is missing"),
    "unknown": ("sd1.ldm", "autoencoder/model.safetensors", lambda w: w | {"more": torch.ones(1)}, "more is unknown"),
    "tower": ("sd1.ldm", "condition.text/open_clip_model.safetensors", lambda w: {}, "is missing"),
    "config": ("sd1.ldm", "config.json", lambda c: {"_target_": c["_target_"]}, "does not say 'autoencoder'"),
    "words": ("of_words.ldm", f"{bundle.WORDS}/vocab.txt", None, r"There is no .*vocab\.txt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_our_own_folder_is_looked_at_as_well(models, tmp_path, name):
    source, place, change, words = BROKEN[name]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read(changed(models, source, tmp_path, place, change))


def test_a_dit_that_lacks_a_tensor_is_not_written(models, tmp_path):
    folder = changed(models, "of_classes.ldm", tmp_path, "model.safetensors", lambda w: w)
    held = read(folder)[0]
    del held.weights["denoiser.backbone.last.out.bias"]
    for target, layout in (("one.safetensors", "dit"), ("two", "diffusers")):
        with pytest.raises(ValueError, match=r"last\.out\.bias is missing"):
            write(held, tmp_path / target, layout)


def test_a_beginning_that_is_refused_changes_nothing():
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.denoiser = torch.nn.Module()
    net.denoiser.backbone = UNet(4, Widths(), width=32, mult=(1, 2), res_blocks=1, depth=(0, 0), middle_depth=0)
    before = {n: x.clone() for n, x in net.state_dict().items()}
    there = {n: x + 1 for n, x in before.items()} | {"denoiser.backbone.out.2.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"is another network: denoiser\.backbone\.out\.2\.bias: \(3,\) there, \(4,\) here"):
        begin(net, there, "elsewhere")
    assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())


@pytest.mark.parametrize("rows", [1000, 1001, 11])
def test_a_class_table_without_a_row_of_no_label(models, tmp_path, rows):
    """ImageNet's 1,000 rows are its classes: a row of zeros is added, said, and taken away again; others have the row."""
    table = torch.randn(rows, 64)
    weights = load_tensors(models / "of_classes.safetensors") | {dit.TABLE: table}
    save_tensors(weights, tmp_path / "net.safetensors")
    held = read(str(tmp_path / "net.safetensors"), "Noise")[0]
    classes, ours = 1000 if rows > 11 else 10, held.weights[conditions.LABEL]
    assert held.recipe["condition"]["label"]["classes"] == classes == len(ours) - 1
    assert torch.equal(ours[:rows], table) and ("draw with guidance=none" in describe(held)) == (rows == 1000)
    write(held, tmp_path / "back.safetensors", "dit")
    assert torch.equal(load_tensors(tmp_path / "back.safetensors")[dit.TABLE], table)
    held.weights[conditions.LABEL] = ours[:1000]
    if rows > 11:
        with pytest.raises(ValueError, match="read as 1,000 classes, and this model has 999"):
            write(held, tmp_path / "back.safetensors", "dit")


def test_a_backbone_of_another_kind_still_begins_a_training(models, tmp_path):
    """A model at rest may have a backbone that travels nowhere: its own layout reads it."""
    mlp = {"_target_": "ldm.backbone.mlp.MLP", "_partial_": True}
    folder = changed(models, "sd1.ldm", tmp_path, "config.json", lambda told: told | {"backbone": mlp})
    assert weights_for("model", folder).keys() == load_tensors(models / "sd1.ldm" / "model.safetensors").keys()


def test_what_lies_beside_a_text_tower_goes_along(models, tmp_path):
    """Statistics of whitening, from our layout to ours."""
    folder = changed(models, "sd1.ldm", tmp_path, "config.json", lambda told: json.loads(json.dumps(told)))
    save_tensors({"layer.3.mean": torch.ones(64)}, tmp_path / "sd1.ldm" / "condition.text" / "statistics.safetensors")
    write(read(folder)[0], tmp_path / "again", "ldm")
    assert (tmp_path / "again" / "condition.text" / "statistics.safetensors").is_file()
    assert read_json(tmp_path / "again" / "config.json") == read_json(tmp_path / "sd1.ldm" / "config.json")
