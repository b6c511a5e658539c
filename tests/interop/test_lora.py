"""LoRA files: every module by every name, what they compute as diffusers and PEFT compute it, there and back."""

import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open

from helpers.family import their_pipeline_and_ours, their_text
from ldm.build import load_model
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.interop.__main__ import main
from ldm.interop.adapter._lora_names import modules_of
from ldm.interop.adapters import read_any, with_towers
from ldm.interop.convert import read

KINDS = ["sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd2", "xl"))]
DIFFUSERS = ("down_", "up_", "mid_", "conv_", "time_embedding", "add_")  # how its names begin behind lora_unet_
COMPVIS = ("input_", "output_", "middle_", "time_embed_", "label_", "out_")
X, STEP = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 300
PROMPTS = ["a red fox", "two"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> diffusers' pipeline; home, with ours of it in `ours`; bundle, ours apart; known, its modules by every name."""

    @cache
    def make(kind):
        home = tmp_path_factory.mktemp(kind)
        pipeline = their_pipeline_and_ours(kind, home)
        bundle = with_towers(read(str(home / "ours"))[0])
        return SimpleNamespace(kind=kind, pipeline=pipeline, home=home, bundle=bundle, known=modules_of(bundle))

    return make


@pytest.fixture(params=KINDS)
def model(request, made):
    return made(request.param)


@pytest.fixture
def one(made):
    return made("sd1")


def is_kohyas(name, kind):
    """Whether kohya's scripts write a module's name so."""
    if name.startswith("lora_te"):
        return "text_model" in name and not name.startswith("lora_te_" if kind == "xl" else "lora_te1_")
    return name.startswith("lora_unet_") and not name.removeprefix("lora_unet_").startswith(
        DIFFUSERS if kind == "xl" else COMPVIS
    )


def kohya(model, only="", ranks=(4, 2), alphas=(1.0, 2.0, None), seed=0):
    """A file of the modules whose names hold `only`, with random factors, its ranks and alphas in turn."""
    torch.manual_seed(seed)
    made = {}
    for i, name in enumerate(n for n in model.known if is_kohyas(n, model.kind) and re.search(only, n)):
        rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
        module = model.known[name]
        out, into, *kernel = module.tie.split(module.weight(model.bundle.weights))[module.part].shape
        made[f"{name}.lora_down.weight"] = torch.randn(rank, into, *kernel) / into**0.5
        made[f"{name}.lora_up.weight"] = torch.randn(out, rank, *(1,) * len(kernel)) / rank**0.5
        made |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return made


def test_kohyas_file_of_every_module_is_the_closed_form(model):
    """W + strength alpha / rank up down: matrices, kernels of 1 and 3, ranks and alphas mixed, some without alpha."""
    file, before = kohya(model), model.bundle.weights
    save_tensors(file, model.home / "style.safetensors")
    merged = load_model(model.home / "ours", adapters=f"{model.home}/style.safetensors:0.7").state_dict()
    wanted = {name: before[name].double() for name in {module.tensor for module in model.known.values()}}
    names = {key.partition(".")[0] for key in file}
    assert {model.known[name].tensor for name in names} == wanted.keys()
    for name in names:
        down, up = (file[f"{name}.lora_{part}.weight"].double() for part in ("down", "up"))
        scale = float(file.get(f"{name}.alpha", torch.tensor(len(down)))) / len(down)
        place = wanted[model.known[name].tensor][model.known[name].start : model.known[name].end]
        place += 0.7 * scale * (up.flatten(1) @ down.flatten(1)).reshape(place.shape)
    assert all((merged[name] - x).abs().max() < 1e-6 for name, x in wanted.items())
    assert all(torch.equal(merged[name], before[name]) for name in before.keys() - wanted.keys())


def told(model):
    """What diffusers tells its U-Net of the prompts."""
    embeds, _, *pooled = model.pipeline.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if model.kind != "xl":
        return {"encoder_hidden_states": embeds}
    numbers = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(embeds))
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": numbers}}


@torch.no_grad()
def ours_said(model, loaded):
    fields = {n: torch.full((2,), 0.0 if "crop" in n else 16.0) for n in loaded.conditioner.fields if n != "caption"}
    return loaded.denoiser.backbone(X, torch.full((2,), float(STEP)), loaded.condition({"caption": PROMPTS, **fields}))


@torch.no_grad()
def test_merged_is_what_diffusers_draws_unmerged(model):
    """Several at once, with strengths of either sign, on all that diffusers' own converter knows; in another order the same."""
    attends = "unet.*(attn|ff_net|proj_in|proj_out)" if model.kind == "xl" else "unet.*(attn|ff_net|proj_in|proj_out|resnets)"
    strengths = {"a": 0.7, "b": -0.3}
    theirs = told(model)
    for i, name in enumerate(strengths):
        save_tensors(kohya(model, attends, (4,), (2.0,), seed=i), model.home / f"{name}.safetensors")
        model.pipeline.load_lora_weights(str(model.home), weight_name=f"{name}.safetensors", adapter_name=name)
    model.pipeline.set_adapters(list(strengths), list(strengths.values()))
    wanted = model.pipeline.unet(X, STEP, return_dict=False, **theirs)[0]
    model.pipeline.unload_lora_weights()
    words = [f"{model.home}/{name}.safetensors:{strength}" for name, strength in strengths.items()]
    loaded, turned = (load_model(model.home / "ours", adapters=order) for order in (words, words[::-1]))
    assert (ours_said(model, loaded) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    first, second = loaded.state_dict(), turned.state_dict()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    none = load_model(model.home / "ours", adapters=[f"{model.home}/a.safetensors:0"]).state_dict()
    assert all(torch.equal(none[name], x) for name, x in model.bundle.weights.items())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def products(tensors):
    modules = {name.removesuffix(".lora_A.default.weight") for name in tensors if "lora_A" in name}
    up, down = ({m: tensors[f"{m}.lora_{ab}.default.weight"].double().flatten(1) for m in modules} for ab in "BA")
    return {m: float(tensors[f"{m}.lora_alpha"]) / len(down[m]) * up[m] @ down[m] for m in modules}


def test_round_trips(model):
    """kohya's -> ours -> kohya's to the bit; through diffusers' the products, where alpha is folded into B."""
    home, first = model.home, kohya(model)
    save_tensors(first, home / "first.safetensors")
    base = ["--base", str(home / "ours")]
    main([str(home / "first.safetensors"), str(home / "adapter"), "--to", "ldm", *base])
    main([str(home / "adapter"), str(home / "second.safetensors"), "--to", "kohya"])
    second = load_tensors(home / "second.safetensors")
    whole = {
        n.replace("lora_down.weight", "alpha"): torch.tensor(float(len(x))) for n, x in first.items() if "lora_down" in n
    } | first
    assert same(whole, second)
    main([str(home / "adapter"), str(home / "third.safetensors"), "--to", "diffusers"])
    third = read_any(str(home / "third.safetensors"), model.bundle).tensors
    ours = read_any(str(home / "adapter"), model.bundle).tensors
    wanted, found = products(ours), products(third)
    assert wanted.keys() == found.keys() and all((wanted[m] - found[m]).abs().max() < 1e-6 for m in wanted)
    with safe_open(home / "second.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["ss_network_module"], said["ss_network_dim"]) == ("networks.lora", "4")
    if model.kind == "xl":
        assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert any(name.startswith("lora_unet_input_blocks_") for name in second)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_exported_is_what_diffusers_draws(model):
    """`load_lora_weights` of our file of mixed ranks and alphas, and ours merged."""
    save_tensors(kohya(model, "unet.*(attn|resnets|_layers_|conv_shortcut)"), model.home / "mixed.safetensors")
    words = [str(model.home / "mixed.safetensors"), str(model.home / "out.safetensors"), "--to", "diffusers"]
    main([*words, "--base", str(model.home / "ours")])
    theirs = told(model)
    model.pipeline.load_lora_weights(str(model.home), weight_name="out.safetensors")
    wanted = model.pipeline.unet(X, STEP, return_dict=False, **theirs)[0]
    model.pipeline.unload_lora_weights()
    loaded = load_model(model.home / "ours", adapters=f"{model.home}/mixed.safetensors")
    assert (ours_said(model, loaded) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_merged_into_a_whole_model(model):
    """convert --adapters: the same weights as are drawn with, those of the towers too."""
    save_tensors(kohya(model), model.home / "style.safetensors")
    source = f"{model.home}/style.safetensors:0.5:0.25"
    main([str(model.home / "ours"), str(model.home / "merged"), "--to", "ldm", "--adapters", source])
    wanted, found = load_model(model.home / "ours", adapters=source), load_model(model.home / "merged")
    assert same(wanted.state_dict(), found.state_dict())


# ---- spellings, on Stable Diffusion 1


ATTEND = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2."
SPELLED = {  # a module's parts as they were spelled from 2023 to today
    "peft": ("to_k.lora_A.weight", "to_k.lora_B.weight"),
    "0.17": ("to_k.lora.down.weight", "to_k.lora.up.weight"),
    "2023": ("processor.to_k_lora.down.weight", "processor.to_k_lora.up.weight"),
    "linear": ("to_k.lora_linear_layer.down.weight", "to_k.lora_linear_layer.up.weight"),
    "out": ("processor.to_out_lora.down.weight", "processor.to_out_lora.up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_diffusers_spellings(one, spelling, tmp_path):
    down, up = torch.randn(2, 32 if spelling == "out" else 64), torch.randn(32, 2)
    for prefix in ("", "unet."):
        names = [ATTEND.replace("unet.", prefix) + name for name in SPELLED[spelling]]
        save_tensors(dict(zip(names, (down, up))), tmp_path / "a.safetensors")
        found = read_any(str(tmp_path / "a.safetensors"), one.bundle).tensors
        leaf = "out" if spelling == "out" else "k"
        place = f"denoiser.backbone.encoder.1.1.blocks.0.attend_tokens.{leaf}.lora_"
        assert torch.equal(found[f"{place}A.default.weight"], down) and torch.equal(found[f"{place}B.default.weight"], up)


def test_pefts_folder_says_its_alpha(one, tmp_path):
    """By module, and divided by the root of the rank where rsLoRA is on (2312.03732)."""
    names = [f"base_model.model.{ATTEND.removeprefix('unet.')}{letter}" for letter in ("to_k", "to_v")]
    file = {f"{n}.lora_{ab}.weight": torch.randn((4, 64) if ab == "A" else (32, 4)) for n in names for ab in "AB"}
    save_tensors(file, tmp_path / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"attn2.to_v": 2}, "use_rslora": True}
    write_json(told, tmp_path / "adapter_config.json")
    found = read_any(str(tmp_path), one.bundle).tensors
    alphas = {name.split(".")[-2]: float(x) for name, x in found.items() if name.endswith("lora_alpha")}
    assert alphas == {"k": 16.0, "v": 4.0}


def test_tuckers_core_is_multiplied_in(one, tmp_path):
    """LoCon's lora_mid: a kernel of its own between two of size 1."""
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    up, mid, down = torch.randn(32, 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, 32, 1, 1)
    parts = {"lora_up": up, "lora_mid": mid, "lora_down": down}
    save_tensors({f"{name}.{part}.weight": x for part, x in parts.items()}, tmp_path / "a.safetensors")
    before = one.bundle.weights["denoiser.backbone.encoder.1.0.conv_in.weight"]
    after = load_model(one.home / "ours", adapters=f"{tmp_path}/a.safetensors").denoiser.backbone.encoder[1][0].conv_in.weight
    wanted = before + torch.einsum("ojxy,jkhw,kixy->oihw", up, mid, down)
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_towers_against_peft_on_transformers_own(one, tmp_path):
    """q, k, v, out and both feed-forwards of every layer; the last hidden state."""
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    peer = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, target_modules=names), their_text())
    for name, p in peer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    file = {f"text_encoder.{n.replace('.default', '')}": p for n, p in peer.named_parameters() if "lora_" in n}
    told = {"text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    save_tensors(file, tmp_path / "text.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    text = load_model(one.home / "ours", adapters=f"{tmp_path}/text.safetensors").conditioner.embedders["text"]
    ids = text.ids(PROMPTS)
    wanted = peer(input_ids=ids).last_hidden_state
    found = text(PROMPTS, torch.zeros(2, dtype=torch.bool)).tokens
    assert len(file) == 2 * 6 * 3 and (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def factors(name, rank, into, out):
    return {f"{name}.lora_down.weight": torch.ones(rank, into), f"{name}.lora_up.weight": torch.ones(out, rank)}


K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
GOOD = factors(K, 2, 64, 32)
WRONG = {
    "none": (
        factors("lora_unet_double_blocks_0_img_attn_proj", 2, 8, 8),
        r"none of its 1 updates is of this model \(first: lora_u",
    ),
    "some": ({**GOOD, **factors(f"{K}x", 2, 64, 32)}, rf"1 of its 2 updates are of nothing here: {K}x; nearest: {K}"),
    "family": (
        factors(K, 2, 2048, 32),
        r"1 of its 1 updates do not fit .*\(32, 2048\) there and \(32, 64\) here; it is for Stable",
    ),
    "ranks": ({**GOOD, f"{K}.lora_up.weight": torch.ones(32, 4)}, r"lora_down has rank 2, lora_up rank 4"),
    "half": ({f"{K}.lora_down.weight": torch.ones(2, 64)}, r"lora_up\.weight is missing"),
    "nan": ({**GOOD, f"{K}.lora_up.weight": torch.full((32, 2), torch.nan)}, rf"{K}\.lora_up\.weight .*not finite"),
    "nothing": ({**GOOD, f"{K}.alpha": torch.tensor(0.0)}, r"alpha 0 would make it nothing"),
    "lokr": ({f"{K}.lokr_w1": torch.ones(2, 2)}, r"holds LoKr updates \(.*lokr_w1\); LoRA, LoCon and DoRA are known"),
    "loha": ({**GOOD, "lora_unet_x.hada_w1_a": torch.ones(2, 2)}, r"holds LoHa updates"),
    "difference": ({**GOOD, "lora_unet_conv_in.diff": torch.ones(2, 2)}, r"holds full difference updates"),
    "t5": ({**GOOD, **factors("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 2, 8, 8)}, r"of nothing here: lora_te3"),
    "whole": ({"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, r"of no adapter.*model="),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit_are_named(one, case, tmp_path):
    tensors, message = WRONG[case]
    save_tensors(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(Refusal, match=message):
        load_model(one.home / "ours", adapters=f"{tmp_path}/a.safetensors")


def test_what_is_no_model_names_the_word_that_takes_it(one, tmp_path, monkeypatch):
    """Both ways; and of a folder's files no two may say the same."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        save_tensors(GOOD, tmp_path / "both" / f"{name}.safetensors")
    lora = tmp_path / "both" / "a.safetensors"
    with pytest.raises(Refusal, match=rf"{lora} is a LoRA, and no model: model=BASE adapters={lora} puts it on one"):
        load_model(lora)
    with pytest.raises(Refusal, match=rf"{K}.* is in several of \['a.safetensors', 'b.safetensors'\]; name one file"):
        load_model(one.home / "ours", adapters=str(tmp_path / "both"))


def test_what_is_told_of_old_files(one, tmp_path, capsys):
    save_tensors(GOOD, tmp_path / "old.safetensors")
    load_model(one.home / "ours", adapters=f"{tmp_path}/old.safetensors")
    assert (
        "1 updates of rank 2" in (said := capsys.readouterr().out)
        and said.count("no alpha: alpha = rank, as old files mean") == 1
    )
