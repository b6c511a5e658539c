"""Weights travel both ways and to the bit; what they compute is what diffusers and transformers compute."""

import json
import zipfile

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from helpers.family import loud, their_pipeline, their_text, their_tokenizer, their_unet, their_vae
from ldm.autoencoder.kl import KL
from ldm.backbone.unet import UNet
from ldm.build import load_model
from ldm.condition.text import Text
from ldm.drawing.generate import unit_noise
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.guidance.cfg import CFG
from ldm.interop.__main__ import main
from ldm.interop.bundle import shapes_of
from ldm.interop.convert import read, write
from ldm.interop.network import unet
from ldm.interop.part import autoencoder
from ldm.interop.part import clip as text
from ldm.interop.tie import bring, give, taken
from ldm.nn.layers import identity
from ldm.nn.sinusoid import sinusoid
from ldm.sampler.ddim import DDIM
from ldm.sampler.dpmpp import DPMpp
from ldm.sampler.euler import Euler
from ldm.sampler.grid import Leading
from ldm.tower.clip import blank_text_tower
from ldm.types import Cond, Widths

KINDS = ("sd1", "sd2", "inpaint", "xl")
DEFAULTS = {"res_blocks": 1, "heads": 8, "head_width": None, "tokens_only": ()}
X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0])


def carried(ours, theirs, ties):
    """Brings their weights into ours and back; every tensor of theirs is used, and returns to the bit."""
    weights = theirs.state_dict()
    assert taken(ties) == set(weights)
    ours.load_state_dict(bring(ties, weights, shapes_of(ours)), strict=False)
    back = give(ties, ours.state_dict())
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    return ours.eval()


# ---- networks against diffusers and transformers, float32

TOPOLOGIES = {
    "sd1": (((True, True, False), 48), {"mult": (1, 2, 2)}, {"depth": (1, 1, 0)}),
    "sd2": (((True, False), 48), {"width": 64, "attention_head_dim": (1, 2), "use_linear_projection": True}, {"head_width": 64}),
    "refiner": (
        ((False, True, False), 48),
        {"mult": (1, 2, 2), "attention_head_dim": (2, 4, 4), "transformer_layers_per_block": 2, "use_linear_projection": True},
        {"depth": (0, 2, 0), "middle_depth": 2, "head_width": 16},
    ),
    "inpainting": (((True, False), 48), {"spatial": 5}, {}),
    "depth": (
        ((True, False), 48),
        {"spatial": 1, "use_linear_projection": True, "attention_head_dim": (2, 4)},
        {"head_width": 16},
    ),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_unets(name):
    (attends, tokens), theirs, settings = TOPOLOGIES[name]
    peer = their_unet(attends, tokens, **theirs)
    shape = {"width": theirs.get("width", 32), "mult": theirs.get("mult", (1, 2)), "depth": (1, 0), **DEFAULTS, **settings}
    spatial = theirs.get("spatial", 0)
    ours = UNet(4, Widths(tokens=tokens, spatial=spatial), **shape)
    carried(ours, peer, unet.diffusers(ours.state_dict(), shape))
    x, words = torch.cat((X, X, X), 1)[:, : 4 + spatial], torch.randn(2, 7, tokens)
    torch.testing.assert_close(ours(x, T, Cond(tokens=words)), peer(x, T, words).sample, atol=1e-4, rtol=0)


def test_the_unet_of_xl():
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 48}
    extra |= {"transformer_layers_per_block": (1, 3), "use_linear_projection": True, "attention_head_dim": (2, 4)}
    peer = their_unet((False, True), 48, **extra)
    shape = {**DEFAULTS, "width": 32, "mult": (1, 2), "depth": (0, 3), "middle_depth": 3, "head_width": 16}
    ours = UNet(4, Widths(tokens=48, vector=64), **shape)
    carried(ours, peer, unet.diffusers(ours.state_dict(), shape))
    words, pooled, sizes = torch.randn(2, 7, 48), torch.randn(2, 16), torch.rand(2, 6) * 1000
    told = Cond(tokens=words, vector=torch.cat((pooled, sinusoid(sizes.flatten(), 8).reshape(2, -1)), 1))
    wanted = peer(X, T, words, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    torch.testing.assert_close(ours(X, T, told), wanted, atol=1e-4, rtol=0)


def test_the_unet_of_the_x4_upscaler():
    """Its noise augmentation's level is a row of a table, added to the noise level's embedding as it is."""
    only = {"only_cross_attention": (True, True, False), "num_class_embeds": 30, "use_linear_projection": True}
    peer = their_unet((False, True, True), 48, mult=(1, 2, 2), spatial=3, **only)
    shape = {**DEFAULTS, "width": 32, "mult": (1, 2, 2), "depth": (0, 1, 1), "tokens_only": (0, 1)}
    ours = UNet(4, Widths(tokens=48, vector=128, spatial=3), **shape, vector=identity)
    ties = unet.diffusers(ours.state_dict(), shape)
    assert set(peer.state_dict()) - taken(ties) == {"class_embedding.weight"}
    ours.load_state_dict(bring(ties, peer.state_dict(), shapes_of(ours)))
    x, words, noise = torch.cat((X, X[:, :3]), 1), torch.randn(2, 7, 48), torch.tensor([5, 20])
    told = Cond(tokens=words, vector=peer.class_embedding(noise))
    torch.testing.assert_close(ours(x, T, told), peer(x, T, words, class_labels=noise).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("resnet", [False, True], ids=["ffhq", "churches"])
def test_unconditional_unets(resnet):
    """LDM-4 of FFHQ, and LDM-8 of LSUN churches: scale and shift, resizing within residual blocks."""
    words = {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"} if resnet else {}
    kinds = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2, "attn_norm_num_groups": 32}
    numbers = {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "layers_per_block": 1}
    peer = loud(UNet2DModel(8, 4, 4, block_out_channels=(32, 64), attention_head_dim=16, **kinds, **numbers, **words))
    shape = {**DEFAULTS, "width": 32, "mult": (1, 2), "depth": (1, 1), "head_width": 16}
    ours = UNet(4, Widths(), **shape, scale_shift=resnet, res_resample=resnet)
    carried(ours, peer, unet.diffusers(ours.state_dict(), shape))
    torch.testing.assert_close(ours(X, T, Cond()), peer(X, T).sample, atol=1e-4, rtol=0)


def test_the_autoencoder():
    peer = their_vae((1, 2, 2))
    config = {"width": 32, "mult": [1, 2, 2], "res_blocks": 1}
    ours = carried(KL(**config), peer, autoencoder.diffusers(KL(**config).state_dict(), config))
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    told = peer.encode(images).latent_dist
    torch.testing.assert_close(ours.posterior(images).mean, told.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.posterior(images).std, told.std, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.decode(told.mean), peer.decode(told.mean).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers, norm", [((-1,), True), ((-2,), True), ((-2,), False)], ids=["sd1", "sd2", "xl"])
@pytest.mark.parametrize("act, pad, word", [("quick_gelu", 49407, "<|endoftext|>"), ("gelu", 0, "!")])
def test_text_towers(act, pad, word, layers, norm, tmp_path):
    peer = their_text(act, projection=24)
    config = text.open_clip_config(json.loads(peer.config.to_json_string()), projects=True)
    tower = blank_text_tower(config)
    names = [n for n in tower.state_dict() if n != "logit_scale"]
    carried(tower, peer, text.transformers(names))
    save_tensors({n: tower.state_dict()[n] for n in names}, tmp_path / "clip" / "open_clip_model.safetensors")
    write_json({"model_cfg": config, "preprocess_cfg": {}}, tmp_path / "clip" / "open_clip_config.json")
    reader = Text(f"local-dir:{tmp_path}/clip", layers=layers, final_norm=norm, padding=pad, pooled=True)
    captions = ["", "a red apple, on a table", "a lion's mane " * 9]
    ids = their_tokenizer(tmp_path / "words", word)(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(reader.ids(captions), ids)
    told, wanted = reader(captions, torch.zeros(3, dtype=torch.bool)), peer(ids, output_hidden_states=True)
    hidden = wanted.hidden_states[layers[0]]
    hidden = peer.text_model.final_layer_norm(hidden) if norm else hidden
    torch.testing.assert_close(told.tokens, hidden, atol=1e-4, rtol=0)
    torch.testing.assert_close(told.vector, wanted.text_embeds, atol=1e-4, rtol=0)


# ---- whole models


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory):
    """A pipeline, its folder, and the same model at rest in our layout."""
    home = tmp_path_factory.mktemp(request.param)
    pipeline = their_pipeline(request.param, home / "words")
    pipeline.save_pretrained(home / "theirs")
    bundle, layout = read(str(home / "theirs"))
    assert layout == "diffusers"
    write(bundle, home / "ours", "ldm", licence="apache-2.0", source=str(home / "theirs"))
    return request.param, pipeline, home


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trips_are_identities(family):
    kind, _, home = family
    write(read(str(home / "ours"))[0], home / "again", "diffusers")
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        theirs, again = (load_tensors(home / place / f"{part}.safetensors") for place in ("theirs", "again"))
        prefixed = {n if n.startswith("text_") or "text" not in part else f"text_model.{n}": x for n, x in theirs.items()}
        assert same_weights(prefixed, again), part
    assert json.loads((home / "again/scheduler/scheduler_config.json").read_text())["prediction_type"] == (
        "v_prediction" if kind == "sd2" else "epsilon"
    )
    told = json.loads((home / "again/vae/config.json").read_text())
    assert told["scaling_factor"] == (0.13025 if kind == "xl" else 0.18215)


def test_through_compvis_and_back(family):
    kind, _, home = family
    first, _ = read(str(home / "ours"))
    write(first, home / "single.safetensors", "compvis")
    again, layout = read(str(home / "single.safetensors"))
    assert layout == "compvis" and same_weights(first.weights, again.weights)
    assert same_weights(first.parts["autoencoder"].weights, again.parts["autoencoder"].weights)
    assert [again.recipe[part] == first.recipe[part] for part in ("schedule", "prediction", "level")] == [True] * 3
    write(again, home / "home", "diffusers")
    write(first, home / "direct", "diffusers")
    for encoder in ("text_encoder", "text_encoder_2") if kind == "xl" else ("text_encoder",):
        a, b = (load_tensors(home / place / encoder / "model.safetensors") for place in ("home", "direct"))
        assert same_weights(a, b)


SAMPLERS = {
    "ddim": (DDIM, Leading(last=1 / 1000), DDIMScheduler, {}),
    "euler": (Euler, Leading(), EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "dpmpp": (DPMpp, Leading(spare=1), DPMSolverMultistepScheduler, {"timestep_spacing": "leading"}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_prompt_to_picture(family, name, monkeypatch):
    """10 steps in float64 with guidance 7.5 and a negative prompt, from the same noise.

    Inpainting's pipeline draws the masked picture's latents; ours tells their mean, and so it is made to.
    """
    kind, pipeline, home = family
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda told, generator=None: told.mean)
    sampler, grid, peer, only = SAMPLERS[name]
    pipeline.scheduler = peer.from_config(pipeline.scheduler.config, **only)
    pipeline.to(torch.float64).set_progress_bar_config(disable=True)
    model = load_model(home / "ours").double()
    seeds = [3, 4]
    noise = unit_noise(seeds, (4, 8, 8)).double()
    picture, mask = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1, torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    mask[0, :, 3:9, 4:] = mask[1, :, 8:, :11] = 1
    wanted = pipeline(
        ["a red apple", "fox"],
        negative_prompt=["blurry"] * 2,
        num_inference_steps=10,
        guidance_scale=7.5,
        latents=noise,
        height=16,
        width=16,
        output_type="pt",
        **({"image": (picture + 1) / 2, "mask_image": mask} if kind == "inpaint" else {}),
    ).images
    ask = {"caption": ["a red apple", "fox"], "negative.caption": ["blurry"] * 2}
    ask |= {"image": picture, "mask": mask} if kind == "inpaint" else {}
    if kind == "xl":
        ask |= {field: torch.full((2,), 0 if "crop" in field else 16) for field in model.conditioner.embedders["number"].key}
    with torch.no_grad():
        latents = sampler(10, grid=grid)(CFG(7.5)(model, ask), model.denoiser.schedule, noise, seeds)
        drawn = model.autoencoder.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(drawn.add(1).div(2), wanted.double(), atol=1e-4, rtol=0)


# ---- what is not a model


def test_the_command_says_what_it_found(family, monkeypatch, capsys):
    kind, _, home = family
    if kind != "sd1":
        pytest.skip("once is enough")
    monkeypatch.setattr("sys.argv", ["", f"{home}/theirs", f"{home}/told", "--to", "ldm", "--licence", "mit"])
    main()
    told = capsys.readouterr().out
    assert "in the layout of diffusers" in told and "Noise on ScaledLinear" in told
    assert "license: mit" in (home / "told" / "README.md").read_text()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A Stable Diffusion 1 in one file, and its tensors."""
    home = tmp_path_factory.mktemp("single")
    their_pipeline("sd1", home / "words").save_pretrained(home / "theirs")
    write(read(str(home / "theirs"))[0], home / "model.safetensors", "compvis")
    return home / "model.safetensors", load_tensors(home / "model.safetensors")


def refused(weights, path):
    save_tensors(weights, path)
    with pytest.raises(ValueError) as error:
        read(str(path))
    return str(error.value)


def test_what_is_missing_unknown_or_of_another_kind_is_named(single, tmp_path):
    _, weights = single
    gone = "model.diffusion_model.input_blocks.1.1.proj_in.bias"
    assert gone in refused({n: x for n, x in weights.items() if n != gone}, tmp_path / "a.safetensors")
    assert "control.0.weight" in refused(weights | {"control.0.weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    lora = {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(2)}
    assert "is a LoRA" in refused(lora, tmp_path / "c.safetensors")
    lora = {"unet.mid_block.attentions.0.processor.to_q_lora.down.weight": torch.zeros(2)}
    assert "is a LoRA" in refused(lora, tmp_path / "c.safetensors")
    halves = {n: x.half() for n, x in weights.items()}
    halves[gone][3] = float("nan")
    assert "proj_in.bias (float16) holds numbers that are not finite" in refused(halves, tmp_path / "d.safetensors")
    assert "no model in CompVis" in refused({"a": torch.zeros(1)}, tmp_path / "e.safetensors")


def test_the_yaml_of_another_model_is_named(single, tmp_path):
    path, weights = single
    told = path.with_suffix(".yaml").read_text()
    (tmp_path / "a.yaml").write_text(told.replace("context_dim: 64", "context_dim: 2048"))
    assert "context_dim=2048 there, 64 in the weights" in refused(weights, tmp_path / "a.safetensors")


def test_truncated_files_and_strange_pickles_are_named(single, tmp_path):
    path, _ = single
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read(str(tmp_path / "cut.safetensors"))
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list and no tensors by name"):
        read(str(tmp_path / "list.ckpt"))
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.ckpt")
    with pytest.raises(ValueError, match="holds a dict and no tensors by name"):
        read(str(tmp_path / "numbered.ckpt"))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is not whole JSON"):
        read(str(tmp_path))
    torch.save({"state_dict": {"a": zipfile.ZipFile}}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="damaged, or holds code"):
        read(str(tmp_path / "code.ckpt"))


def test_a_pickle_with_a_callback_and_averages(single, tmp_path):
    """As sd-v1-4.ckpt: a class as a key, and LitEma's averages, which are what is taken."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    path, weights = single
    averages = {n: x + 1 for n, x in weights.items() if n.startswith("model.diffusion_model.")}
    dotless = {"model_ema." + n.removeprefix("model.").replace(".", ""): x for n, x in averages.items()}
    state = (
        weights | dotless | {"model_ema.decay": torch.tensor(0.99), "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2}
    )
    torch.save({"state_dict": state, "callbacks": {ModelCheckpoint: {"best_model_score": None}}}, tmp_path / "old.ckpt")
    (tmp_path / "old.yaml").write_text(path.with_suffix(".yaml").read_text())
    told, plain = read(str(tmp_path / "old.ckpt"))[0], read(str(path))[0]
    assert same_weights(told.weights, {n: x + 1 for n, x in plain.weights.items()})


def test_stable_diffusion_2_must_say_which_it_is(tmp_path):
    their_pipeline("sd2", tmp_path / "words").save_pretrained(tmp_path / "theirs")
    bundle, _ = read(str(tmp_path / "theirs"))
    write(bundle, tmp_path / "a.safetensors", "compvis")
    assert read(str(tmp_path / "a.safetensors"))[0].recipe["prediction"]["_target_"] == "ldm.prediction.Velocity"


def test_what_no_pipeline_can_do_is_named(single, tmp_path):
    bundle, _ = read(str(single[0]))
    bundle.recipe["schedule"] = {"_target_": "ldm.schedule.Linear"}
    with pytest.raises(ValueError, match="schedule=scaled_linear"):
        write(bundle, tmp_path, "diffusers")


@pytest.mark.slow
def test_stable_diffusion_1_at_full_size():
    """U-Net, autoencoder and text tower of Stable Diffusion 1.5, random weights shared by both sides: 5 GiB."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet_there = UNet2DConditionModel(attention_head_dim=8, cross_attention_dim=768).eval()
    torch.nn.init.normal_(unet_there.conv_out.weight, std=0.05)
    settings = {"res_blocks": 2, "heads": 8, "head_width": None, "width": 320, "mult": (1, 2, 4, 4), "depth": (1, 1, 1, 0)}
    config = CLIPTextConfig(
        projection_dim=768, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    config.vocab_size, config.hidden_act = 49408, "quick_gelu"
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae_there = AutoencoderKL(block_out_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2, **levels).eval()
    text_there = CLIPTextModel(config).eval()
    told = json.loads(config.to_json_string()) | {"architectures": ["CLIPTextModel"]}
    with torch.device("meta"):
        unet_here, vae_here = UNet(4, Widths(tokens=768)), KL()
    text_here = blank_text_tower(text.open_clip_config(told, projects=False))
    mult = {"mult": (1, 2, 4, 4)}
    for here, there, ties in (
        (unet_here, unet_there, unet.diffusers(unet_here.state_dict(), settings)),
        (vae_here, vae_there, autoencoder.diffusers(vae_here.state_dict(), mult)),
        (text_here, text_there, text.transformers(n for n in text_here.state_dict() if n != "logit_scale")),
    ):
        theirs = {
            n if not n.startswith(("emb", "encoder.l", "final")) else f"text_model.{n}": x for n, x in there.state_dict().items()
        }
        here.load_state_dict(bring(ties, theirs, shapes_of(here)), strict=False, assign=True)
    from ldm.tower.clip import embed_text as read_tower

    torch.set_grad_enabled(False)
    x, words, ids = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768), torch.randint(0, 49406, (1, 77))
    ids[0, -1] = 49407
    pairs = {
        "U-Net": (unet_here(x, T[1:], Cond(tokens=words)), unet_there(x, T[1:], words).sample),
        "text tower": (text_here.ln_final(read_tower(text_here, ids)[0][-1]), text_there(ids).last_hidden_state),
        "decoder": (vae_here.reconstruct(x[..., :16, :16]), vae_there.decode(x[..., :16, :16]).sample),
    }
    torch.set_grad_enabled(True)
    for name, (here, there) in pairs.items():
        print(f"{name}: max |diff| {float((here - there).abs().max()):.1e} of {float(there.abs().max()):.2f}")
        torch.testing.assert_close(here, there, atol=1e-4, rtol=0)
