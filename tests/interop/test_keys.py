"""Every key of every config that diffusers and transformers write is used, or has the only value that is built, or is refused."""

import inspect
import json
import os
import shutil

import diffusers
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from transformers import CLIPTextConfig, T5Config

from helpers.family import their_pipeline, their_tokenizer, their_unet
from ldm.build import load_autoencoder, load_model
from ldm.condition.text import Text
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.interop.__main__ import main
from ldm.interop.convert import read, write
from ldm.interop.keys import CLASSES
from ldm.interop.schedulers import DRAWING, GRID, MODEL, REFUSED, SILENT, TAKES, read_schedule

OF_TRANSFORMERS = {"CLIPTextModel": CLIPTextConfig(), "T5EncoderModel": T5Config(feed_forward_proj="gated-gelu")}
CONFIGS = {"LDMBertModel": LDMBertConfig, "Transformer2DModel": diffusers.DiTTransformer2DModel}


def keys_of(made):
    return {n: p.default for n, p in inspect.signature(made.__init__).parameters.items() if n not in ("self", "kwargs")}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_key_of_a_class_is_known(kind):
    """And the value that its class means, where nothing is said, is one that is built."""
    keys, of_transformers = CLASSES[kind], OF_TRANSFORMERS.get(kind)
    theirs = keys_of(CONFIGS.get(kind) or getattr(diffusers, kind)) if of_transformers is None else of_transformers.to_dict()
    assert {name for name in theirs if name[0] != "_"} - keys.known() == set()
    assert {name: theirs[name] for name, only in keys.only.items() if name in theirs and theirs[name] not in only} == {}


@pytest.mark.parametrize("kind", TAKES)
def test_every_key_of_a_scheduler_is_known(kind, tmp_path):
    theirs = keys_of(getattr(diffusers, kind))
    assert TAKES[kind] == theirs.keys() and TAKES[kind] <= {*MODEL, *GRID, *DRAWING, *SILENT, *REFUSED}
    write_json({"_class_name": kind}, tmp_path / "scheduler_config.json")
    schedule, says, grid, remarks = read_schedule(tmp_path)
    assert schedule["_target_"] == "ldm.schedule.DDPM" and says == "Noise"
    assert (schedule["beta_start"], schedule["beta_end"]) == (theirs["beta_start"], theirs["beta_end"])
    assert grid.split()[0] == theirs.get("timestep_spacing", "linspace") and f"{kind} means {grid.split()[0]}" in remarks[0]
    write_json({"_class_name": kind, "use_karras_sigmas": True, "thresholding": True}, tmp_path / "scheduler_config.json")
    _, _, again, remarks = read_schedule(tmp_path)
    assert again == ("karras" if "use_karras_sigmas" in theirs else grid)
    assert ("thresholding=True" in str(remarks)) == ("thresholding" in theirs)
    for key, value in (("trained_betas", [0.1]), ("beta_schedule", "sigmoid"), ("prediction_type", "flow"), ("new", 3)):
        write_json({"_class_name": kind, key: value}, tmp_path / "scheduler_config.json")
        with pytest.raises(ValueError, match=key):
            read_schedule(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("keys")
    for kind in ("sd1", "xl"):
        their_pipeline(kind, home / "words" / kind).save_pretrained(home / kind)
    return home


def other(folder, home, part, **settings):
    """A copy of a folder with other settings of one part."""
    shutil.rmtree(home / "other", ignore_errors=True)
    shutil.copytree(folder, home / "other", copy_function=os.link)
    path = home / "other" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path = path if part[:5] != "token" else path.with_name("tokenizer_config.json")
    write_json(json.loads(path.read_text()) | settings, path)
    return str(home / "other")


WRONG = {
    "unet": [{name: "strange"} for name in CLASSES["UNet2DConditionModel"].only],
    "vae": [{name: "strange"} for name in CLASSES["AutoencoderKL"].only] + [{"down_block_types": ["DownEncoderBlock2D"] * 3}],
    "text_encoder": [{name: "strange"} for name in CLASSES["CLIPTextModel"].only] + [{"quantization_config": {"bits": 4}}],
    "tokenizer": [{"model_max_length": 12}, {"do_lower_case": False}, {"bos_token": "a"}, {"pad_token": "a"}],
    "scheduler": [{"rescale_betas_zero_snr": True}, {"num_train_timesteps": 4000}],
}
WRONG["unet"] += [{"attention_head_dim": [2, 8]}, {"layers_per_block": [1, 2]}, {"block_out_channels": [32, 80]}]
WRONG["unet"] += [
    {"up_block_types": ["UpBlock2D"] * 2},
    {"cross_attention_dim": [64, 32]},
    {"transformer_layers_per_block": [[1], [1]]},
]
WRONG["vae"] += [{"latents_mean": [0.0] * 4}, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}]


@pytest.mark.parametrize("part, settings", [(p, s) for p, each in WRONG.items() for s in each], ids=lambda x: str(x)[:60])
def test_other_settings_are_refused_by_name(folders, tmp_path, part, settings):
    with pytest.raises(ValueError) as error:
        read(other(folders / "sd1", tmp_path, part, **settings))
    assert next(iter(settings)) in str(error.value)


def test_heads_are_told_by_a_list(folders, tmp_path):
    """One number for all, or heads of one width; levels that do not attend say nothing."""
    for each, heads, width in (([2, 2], 8, None), ([4, 8], 8, 8)):
        s = read(other(folders / "sd1", tmp_path, "unet", attention_head_dim=each))[0].recipe["backbone"]
        assert (s["heads"], s["head_width"]) in ((heads, width), (2, None))


def test_a_part_that_nothing_reads_is_named(folders, tmp_path):
    shutil.copytree(folders / "sd1", tmp_path / "a", copy_function=os.link)
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    write_json(index | {"controlnet": ["diffusers", "ControlNetModel"]}, tmp_path / "a" / "model_index.json")
    with pytest.raises(ValueError, match="with controlnet"):
        read(str(tmp_path / "a"))


def test_means_and_deviations_by_channel_are_the_latents(folders, tmp_path):
    """diffusers' pipeline of XL decodes z = x std / scale + mean."""
    mean, std = [-1.6, 1.9, -1.4, 2.5], [8.4, 5.9, 6.3, 5.7]
    part = read(other(folders / "xl", tmp_path, "vae", latents_mean=mean, latents_std=std))[0].parts["autoencoder"]
    torch.testing.assert_close(part.weights["mean"], torch.tensor(mean))
    torch.testing.assert_close(part.weights["std"], torch.tensor(std) / 0.13025)


def test_learned_words_are_read_and_travel_back(tmp_path):
    """A textual inversion that diffusers saved: the row is read where the prompt has its word, and is there after both ways."""
    from diffusers import StableDiffusionPipeline

    pipeline = their_pipeline("sd1", tmp_path / "words")
    pipeline.tokenizer.add_tokens(["<toy>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    torch.nn.init.normal_(pipeline.text_encoder.get_input_embeddings().weight.data[-1])
    pipeline.save_pretrained(tmp_path / "theirs")
    write(read(str(tmp_path / "theirs"))[0], tmp_path / "ours", "ldm")
    text = load_model(tmp_path / "ours").conditioner.embedders["text"]
    prompts = ["a <toy>", "x <|endoftext|> &amp; y"]
    ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(text.ids(prompts), ids) and 49408 in ids
    with torch.no_grad():
        wanted = pipeline.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(text(prompts, torch.zeros(2, dtype=torch.bool)).tokens, wanted, atol=1e-4, rtol=0)
    write(read(str(tmp_path / "ours"))[0], tmp_path / "again", "diffusers")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(again.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids, ids)


def test_a_text_condition_refuses_words_without_rows(clip_folder):
    for wrong, word in (
        ({"learned": ["<a>"]}, "tokenizer=clip"),
        ({"tokenizer": "clip"}, "padding"),
        ({"tokenizer": "clip", "padding": 0, "learned": ["<a>"]}, "rows"),
    ):
        with pytest.raises(ValueError, match=word):
            Text(f"local-dir:{clip_folder}", **wrong)


def test_a_vocabulary_of_its_own_is_refused(folders, tmp_path):
    shutil.copytree(folders / "sd1", tmp_path / "a", copy_function=os.link)
    shutil.rmtree(tmp_path / "a" / "tokenizer")
    their_tokenizer(tmp_path / "words").save_pretrained(tmp_path / "a" / "tokenizer")
    path = tmp_path / "a" / "tokenizer" / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"]["red</w>"], told["model"]["vocab"]["fox</w>"] = 0, 1
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="a vocabulary of its own"):
        read(str(tmp_path / "a"))


# ---- names and containers


@pytest.fixture(scope="module")
def files(folders):
    """Both models in single files without a yaml."""
    for kind in ("sd1", "xl"):
        write(read(str(folders / kind))[0], folders / f"{kind}.safetensors", "compvis")
        (folders / f"{kind}.yaml").unlink()
    return folders


def same(a, b):
    parts = [(a.weights, b.weights), *((a.parts[p].weights, b.parts[p].weights) for p in a.parts)]
    return a.parts.keys() == b.parts.keys() and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in parts
    )


def test_what_a_file_does_not_say_is_printed(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", str(files / "sd1.safetensors"), str(tmp_path / "out"), "--to", "ldm"])
    main()
    said = capsys.readouterr().out
    words = ("scale: 0.18215", "heads: 32 wide", "hidden layer: -1", "prediction: noise", "schedule: ScaledLinear, betas 0.00085")
    for word in (*words, "steps: leading"):
        assert f"assumed      {word.split(': ')[0]}" in said and word in said, word


def test_marks_of_velocity_and_of_zero_terminal_snr(files, tmp_path):
    weights, none = load_tensors(files / "xl.safetensors"), torch.tensor([])
    save_tensors(weights | {"v_pred": none, "ztsnr": none}, tmp_path / "v.safetensors")
    recipe = read(str(tmp_path / "v.safetensors"))[0].recipe
    assert recipe["prediction"]["_target_"] == "ldm.prediction.Velocity" and recipe["schedule"]["zero_terminal_snr"]
    with pytest.raises(ValueError, match="leave --prediction noise out"):
        read(str(tmp_path / "v.safetensors"), "Noise")
    save_tensors(weights | {"ztsnr": none}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        read(str(tmp_path / "z.safetensors"))


def test_older_names_and_shapes_are_the_same_model(files, tmp_path):
    """A text tower without its prefix, a bias of (C, 1, 1), and numbers of numpy's beside the weights."""
    import numpy as np

    weights = load_tensors(files / "sd1.safetensors")
    old = {n.replace("transformer.text_model.", "transformer."): x for n, x in weights.items()}
    old = {n: x[:, None, None] if n.startswith("first_stage_model.") and n.endswith("q.bias") else x for n, x in old.items()}
    assert sum(x.ndim == 3 for x in old.values()) == 2
    beside = {"loss": np.float64(0.5), "step": np.int64(7), "best": np.float32(1)}
    torch.save({"state_dict": old, "callbacks": beside, "global_step": np.int32(3)}, tmp_path / "old.ckpt")
    assert same(read(str(tmp_path / "old.ckpt"))[0], read(str(files / "sd1.safetensors"))[0])


def test_a_trimmed_tower_is_read_at_its_end(monkeypatch):
    from ldm.interop.part import _clip_file as compvis_text
    from ldm.interop.part._towers import tower_shapes

    text = {"context_length": 16, "vocab_size": 60, "width": 64, "heads": 1, "layers": 3, "proj_type": "none"}
    config = {"embed_dim": 64, "quick_gelu": False, "text_cfg": text}
    weights = {f"cond_stage_model.model.{n}": torch.zeros(s) for n, s in tower_shapes(config).items()}

    def layers(full, told=None):
        monkeypatch.setattr(compvis_text, "FULL", {64: full})
        return compvis_text.read_texts(weights, told)[0]["text"]["layers"]

    assert [layers(3), layers(4), layers(4, -2), layers(3, -1), layers(9)] == [[-2], [-1], [-1], [-1], [-2]]


@pytest.mark.parametrize("kind, ending", [("fp16", "safetensors"), ("bf16", "bin"), ("non_ema", "safetensors")])
def test_variants_as_diffusers_writes_them(folders, tmp_path, kind, ending):
    from diffusers import UNet2DConditionModel

    plain = read(str(folders / "sd1"))[0]
    shutil.copytree(folders / "sd1", tmp_path / "a", copy_function=os.link)
    net = UNet2DConditionModel.from_pretrained(folders / "sd1" / "unet")
    shutil.rmtree(tmp_path / "a" / "unet")
    split = {"max_shard_size": "1MB"} if kind == "fp16" else {}
    net.save_pretrained(tmp_path / "a" / "unet", variant=kind, safe_serialization=ending == "safetensors", **split)
    assert all(kind in f.name for f in (tmp_path / "a" / "unet").iterdir() if f.name != "config.json")
    assert same(read(str(tmp_path / "a"))[0], plain)


def test_a_file_without_its_autoencoder_takes_the_one_that_is_named(files, tmp_path, monkeypatch, capsys):
    """Its scale is the autoencoder's own, or, where that does not say it, the family's of the network."""
    weights = {n: x for n, x in load_tensors(files / "xl.safetensors").items() if not n.startswith("first_stage_model.")}
    save_tensors(weights, tmp_path / "bare.safetensors")
    alone = {
        n.removeprefix("first_stage_model."): x for n, x in load_tensors(files / "xl.safetensors").items() if n not in weights
    }
    save_tensors(alone, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="--autoencoder"):
        write(read(str(tmp_path / "bare.safetensors"))[0], tmp_path / "no", "ldm", source="it")
    for name, vae in (("a", tmp_path / "vae.safetensors"), ("b", files / "xl" / "vae"), ("c", files / "xl.safetensors")):
        words = [str(tmp_path / "bare.safetensors"), str(tmp_path / name), "--to", "ldm", "--autoencoder", str(vae)]
        monkeypatch.setattr("sys.argv", ["", *words])
        main()
        assert ("scale: 0.13025, of this family" in capsys.readouterr().out) == (name != "b")
        std = load_autoencoder(str(tmp_path / name / "autoencoder")).std
        torch.testing.assert_close(std, torch.full((4,), 1 / 0.13025))
    bundle = read(str(tmp_path / "vae.safetensors"))[0]
    assert bundle.assumed[0].startswith("scale: 0.18215")


def test_inpainting_of_xl_travels_both_ways(tmp_path):
    from diffusers import StableDiffusionXLInpaintPipeline as Made

    plain = their_pipeline("xl", tmp_path / "words")
    extra = {n: plain.unet.config[n] for n in ("addition_embed_type", "addition_time_embed_dim", "use_linear_projection")}
    extra |= {n: plain.unet.config[n] for n in ("projection_class_embeddings_input_dim", "attention_head_dim")}
    unet = their_unet((False, True), 64 + 128, spatial=5, transformer_layers_per_block=(1, 3), **extra)
    Made(**{**{n: getattr(plain, n) for n in plain.components if n in COMPONENTS}, "unet": unet}).save_pretrained(tmp_path / "a")
    write(read(str(tmp_path / "a"))[0], tmp_path / "ours", "ldm")
    write(read(str(tmp_path / "ours"))[0], tmp_path / "b", "diffusers")
    again = Made.from_pretrained(tmp_path / "b")
    assert all(torch.equal(x, again.unet.state_dict()[n]) for n, x in unet.state_dict().items())
    assert not again.config.requires_aesthetics_score


COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
