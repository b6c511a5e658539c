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
from transformers import BertTokenizer, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig, PreTrainedTokenizerBase, T5Config

from helpers.family import their_pipeline, their_tokenizer
from ldm.build import load_model
from ldm.condition.text import Text
from ldm.errors import Refusal
from ldm.files.folder import write_json
from ldm.interop.convert import read, write
from ldm.interop.keys import CLASSES, FORM_OF
from ldm.interop.network._unet_config import unet_settings
from ldm.interop.network.dit import NETWORK as DIT
from ldm.interop.part._autoencoder_config import vae_settings
from ldm.interop.part._transformers import open_clip_config
from ldm.interop.part.bert import diffusers_settings

OF_TRANSFORMERS = {"CLIPTextModel": CLIPTextConfig(), "T5EncoderModel": T5Config(feed_forward_proj="gated-gelu")}
OF_TRANSFORMERS |= {"CLIPVisionModelWithProjection": CLIPVisionConfig()}
CONFIGS = {"LDMBertModel": LDMBertConfig, "Transformer2DModel": diffusers.DiTTransformer2DModel}
CONFIGS |= {"CLIPTokenizer": CLIPTokenizer, "BertTokenizer": BertTokenizer}


def keys_of(made):
    return {n: p.default for n, p in inspect.signature(made.__init__).parameters.items() if n not in ("self", "kwargs")}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_key_of_a_class_is_known(kind):
    """And the value that its class means, where nothing is said, is one that is built, or the one that is taken."""
    keys, of_transformers, made = CLASSES[kind], OF_TRANSFORMERS.get(kind), CONFIGS.get(kind) or getattr(diffusers, kind, None)
    theirs = keys_of(made) if of_transformers is None else of_transformers.to_dict()
    if kind.endswith("Tokenizer"):
        special = dict.fromkeys((*PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, "additional_special_tokens"))
        theirs = special | theirs | {n: getattr(made, n) for n in ("padding_side", "truncation_side", "model_input_names")}
    assert {name for name in theirs if name[0] != "_"} - keys.known() == set()
    wrong = {name: theirs[name] for name, only in keys.only.items() if name in theirs and theirs[name] not in only}
    assert wrong == {} or (kind == "BertTokenizer" and wrong.keys() == {"bos_token", "eos_token"})  # which it has not
    assert {name: theirs[name] for name in keys.means} == keys.means
    blocks = {"block_out_channels", "down_block_types", "up_block_types"}
    if keys.means:
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
