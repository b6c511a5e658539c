"""Every key of every config that diffusers and transformers write is used, or has the only value that is built, or is refused."""

import inspect
import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from transformers import BertTokenizer, CLIPTextConfig, CLIPTokenizer, PreTrainedTokenizerBase

from helpers.family import their_pipeline, their_tokenizer, their_unet
from ldm.build import load_autoencoder, load_model
from ldm.condition.text import Text
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.interop.__main__ import main
from ldm.interop.convert import read, write
from ldm.interop.keys import CLASSES, FORM_OF
from ldm.interop.network._unet_config import unet_settings
from ldm.interop.network.dit import NETWORK as DIT
from ldm.interop.part._autoencoder_config import vae_settings
from ldm.interop.part._transformers import open_clip_config
from ldm.interop.part.bert import diffusers_settings
from ldm.interop.schedulers import DRAWING, GRID, MEANS, MODEL, REFUSED, SILENT, TAKES, USUAL, read_schedule
from ldm.sampler.grid import Karras, Leading, Linspace, Trailing
from ldm.schedule import ScaledLinear

CONFIGS = {"CLIPTextModel": CLIPTextConfig, "LDMBertModel": LDMBertConfig, "Transformer2DModel": diffusers.DiTTransformer2DModel}
CONFIGS |= {"CLIPTokenizer": CLIPTokenizer, "BertTokenizer": BertTokenizer}


def keys_of(made):
    return {n: p.default for n, p in inspect.signature(made.__init__).parameters.items() if n not in ("self", "kwargs")}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_key_of_a_class_is_known(kind):
    """And the value that its class means, where nothing is said, is one that is built, or the one that is taken."""
    made = CONFIGS.get(kind) or getattr(diffusers, kind)
    keys = CLASSES[kind]
    theirs = CLIPTextConfig().to_dict() if kind == "CLIPTextModel" else keys_of(made)
    if kind.endswith("Tokenizer"):
        special = dict.fromkeys((*PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, "additional_special_tokens"))
        theirs = special | theirs | {n: getattr(made, n) for n in ("padding_side", "truncation_side", "model_input_names")}
    assert {name for name in theirs if name[0] != "_"} - keys.known() == set()
    wrong = {name: theirs[name] for name, only in keys.only.items() if name in theirs and theirs[name] not in only}
    assert wrong == {} or (kind == "BertTokenizer" and wrong.keys() == {"bos_token", "eos_token"})  # which it has not
    assert {name: theirs[name] for name in keys.means} == keys.means
    blocks = {"block_out_channels", "down_block_types", "up_block_types"}
    if made is not LDMBertConfig and not kind.endswith("Tokenizer"):
        read = {name for name in keys.used.split() if name in theirs and name in FORM_OF}
        sizes = {"num_attention_heads", "attention_head_dim", "num_layers"} if "Transformer" in kind else set()
        assert read - keys.means.keys() == blocks & read | sizes


def test_a_silent_config_means_what_its_class_means():
    net = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32], "cross_attention_dim": 8}
    settings, channels, widths = unet_settings(
        net | {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    )
    assert (channels, widths["tokens"], settings["res_blocks"], settings["heads"], settings["groups"]) == (4, 8, 2, 8, 32)
    text = open_clip_config({"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128}, projects=False)
    assert text["text_cfg"]["vocab_size"] == 49408 and text["text_cfg"]["layers"] == 12 and text["quick_gelu"]
    assert open_clip_config({"projection_dim": None}, projects=False)["embed_dim"] == 512
    with pytest.raises(ValueError, match="projection_dim=None"):
        open_clip_config({"projection_dim": None}, projects=True)


ODD = (None, "x", [], {}, -1, 0, 1.5, [1], ["a"], True, [None], "8", float("nan"))
READERS = {
    "unet": lambda told: unet_settings(told),
    "vae": lambda told: vae_settings(told, Path("vae")),
    "text_encoder": lambda told: open_clip_config(told, projects=False),
    "text_encoder_2": lambda told: open_clip_config(told, projects=True),
    "transformer": lambda told: DIT.read_config(told),
    "bert": lambda told: diffusers_settings(told),
}


@pytest.mark.parametrize("part", READERS)
def test_settings_of_another_kind_are_refused_by_name(part):
    """Whatever stands in the place of a setting that is used: it is built, or named; nothing else is raised."""
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "transformer": diffusers.DiTTransformer2DModel,
    }
    kind = classes[part].__name__ if part in classes else "LDMBertModel" if part == "bert" else "CLIPTextModel"
    theirs = keys_of(classes[part]) if part in classes else LDMBertConfig().to_dict() if part == "bert" else CLASSES[kind].means
    told = {**theirs, "_class_name": kind} | ({"encoder_ffn_dim": 4 * theirs["d_model"]} if part == "bert" else {})
    READERS[part](told)
    for name in CLASSES[kind].used.split():
        for odd in ODD:
            try:
                READERS[part]({**told, name: odd})
            except Refusal as error:
                assert name in str(error) or name == "architectures", (name, odd, str(error))


# ---- schedulers

SPELT = {n: getattr(diffusers, n) for n in dir(diffusers) if n.endswith("Scheduler") and inspect.isclass(getattr(diffusers, n))}
# Tables of betas that no pipeline of this family is drawn from: another shift, the way back, a table of its own.
ELSEWHERE = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"}
ELSEWHERE |= {"RePaintScheduler", "UnCLIPScheduler"}


def test_every_scheduler_with_betas_is_known():
    assert {n for n, made in SPELT.items() if "beta_schedule" in keys_of(made)} == (
        TAKES.keys() | ELSEWHERE
    ) & SPELT.keys() - OPTIONAL


OPTIONAL = {"DPMSolverSDEScheduler"}  # whose signature is hidden where torchsde is not installed


@pytest.mark.parametrize("kind", TAKES)
def test_every_key_of_a_scheduler_is_known(kind, tmp_path):
    path = tmp_path / "scheduler_config.json"
    theirs = keys_of(SPELT[kind])
    means = {**USUAL, **MEANS.get(kind, {})}
    if "beta_start" not in theirs:
        pytest.skip("its signature is hidden: torchsde is not installed")
    assert TAKES[kind] == theirs.keys() and TAKES[kind] <= {*MODEL, *GRID, *DRAWING, *SILENT, *REFUSED}
    assert {name: theirs[name] for name in means if name in theirs} == {n: v for n, v in means.items() if n in theirs}
    write_json({"_class_name": kind}, path)
    schedule, says, grid, remarks = read_schedule(tmp_path)
    assert schedule["_target_"].endswith({"linear": "DDPM", "scaled_linear": "ScaledLinear"}[theirs["beta_schedule"]])
    assert says == "Noise" and (schedule["beta_start"], schedule["beta_end"]) == (theirs["beta_start"], theirs["beta_end"])
    assert grid is None or f"{kind} means {grid.split()[0]}" in remarks[0]
    write_json({"_class_name": kind, "use_karras_sigmas": True, "thresholding": True}, path)
    _, _, again, remarks = read_schedule(tmp_path)
    assert again == ("karras" if "use_karras_sigmas" in theirs else grid)
    assert ("thresholding=True" in str(remarks)) == ("thresholding" in theirs)
    for key, value in (("trained_betas", [0.1]), ("beta_schedule", "sigmoid"), ("prediction_type", "flow"), ("new", 3)):
        write_json({"_class_name": kind, key: value}, path)
        with pytest.raises(ValueError, match=key):
            read_schedule(tmp_path)
    for key in TAKES[kind] & {*MODEL, *GRID}:
        for odd in ODD:
            write_json({"_class_name": kind, key: odd}, path)
            try:
                read_schedule(tmp_path)
            except Refusal as error:
                assert key in str(error) or "betas" in str(error)


GRIDS = {"leading": Leading, "linspace": Linspace, "trailing": Trailing, "karras": Karras}
SAME = sorted(n for n in TAKES if n not in ("LCMScheduler", "TCDScheduler", "PNDMScheduler", *OPTIONAL) and "KDPM2" not in n)


@pytest.mark.parametrize("kind", SAME)
def test_steps_are_those_of_the_scheduler(kind, tmp_path):
    """As it is configured, by whatever spacing, offset and sigmas: the printed words visit the times that it visits."""
    theirs = keys_of(SPELT[kind])
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    told = [{"timestep_spacing": s, "steps_offset": o} for s in ("leading", "linspace", "trailing") for o in (0, 1, 2)]
    told += [{"use_karras_sigmas": True, "timestep_spacing": "linspace"}, {}]
    for said in told:
        if said.keys() - theirs.keys():
            continue
        write_json({"_class_name": kind, **table, **said}, tmp_path / "scheduler_config.json")
        node, _, words, _ = read_schedule(tmp_path)
        name, *settings = words.split()
        grid = GRIDS[name](**{x.split(".")[-1].split("=")[0]: int(x.split("=")[1]) for x in settings})
        schedule = ScaledLinear(**{n: v for n, v in node.items() if n[0] != "_"})
        peer = SPELT[kind](**table, **said)
        peer.set_timesteps(7)
        visited = peer.timesteps.double().unique().flip(0)
        ours = grid(7, schedule)[:-1] * 1000 - 1
        torch.testing.assert_close(ours, visited, atol=0.51, rtol=0)


def test_steps_that_no_grid_here_has_are_said(tmp_path):
    """Karras' sigmas between the first and last step of a spacing: the ends at 30 steps are the printed ones."""
    for spacing in ("leading", "trailing"):
        told = {
            "_class_name": "EulerDiscreteScheduler",
            "use_karras_sigmas": True,
            "timestep_spacing": spacing,
            "steps_offset": 1,
        }
        told |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        write_json(told, tmp_path / "scheduler_config.json")
        node, _, words, remarks = read_schedule(tmp_path)
        said = [x.removeprefix("sampler.grid.").split("=") for x in remarks[0].split() if x.startswith("sampler")]
        peer = diffusers.EulerDiscreteScheduler(**{n: v for n, v in told.items() if n[0] != "_"})
        peer.set_timesteps(30)
        schedule = ScaledLinear(**{n: v for n, v in node.items() if n[0] != "_"})
        ends = {name: float(end) for name, end in said}
        assert words == "karras"
        torch.testing.assert_close(Karras(**ends)(30, schedule)[:-1] * 1000 - 1, peer.timesteps.double(), atol=0.6, rtol=0)


def test_a_scheduler_is_the_class_that_its_pipeline_names(tmp_path):
    write_json(
        {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 0}, tmp_path / "scheduler_config.json"
    )
    assert read_schedule(tmp_path)[2] == "leading sampler.grid.offset=0"
    assert read_schedule(tmp_path, pipeline="StableDiffusionPipeline")[2] == "leading"
    assert read_schedule(tmp_path, "EulerDiscreteScheduler")[2] == "linspace"
    with pytest.raises(ValueError, match="a FlowMatchEulerDiscreteScheduler"):
        read_schedule(tmp_path, "FlowMatchEulerDiscreteScheduler")


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
    "tokenizer": [{name: "strange"} for name in CLASSES["CLIPTokenizer"].only]
    + [{"model_max_length": 12}, {"pad_token": "a"}, {"extra_special_tokens": ["<a>"]}, {"additional_special_tokens": ["<a>"]}],
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
