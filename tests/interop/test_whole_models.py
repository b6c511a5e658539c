"""Whole models beside Stable Diffusion 1, 2 and XL: there, back, and through the command; each draws what its peer draws."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from helpers.family import depth, loud, of_classes, of_words, refiner, their_vae, their_vq, unconditional, upscaler
from ldm.backbone.dit import DiT
from ldm.backbone.unet import UNet
from ldm.build import load_autoencoder, load_model
from ldm.condition.upscale import Upscale
from ldm.drawing.edit import FromPicture
from ldm.drawing.generate import unit_noise
from ldm.files.folder import load_tensors, save_tensors
from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.interop.__main__ import main
from ldm.interop.bundle import BACKBONE, Bundle, recipe_of
from ldm.interop.convert import read, write
from ldm.interop.network import dit
from ldm.interop.network.unet import NETWORK
from ldm.interop.tie import give
from ldm.nn.layers import identity
from ldm.sampler.ddim import DDIM
from ldm.sampler.grid import Leading
from ldm.types import Cond, Draw, Widths

GRID = Leading(last=1 / 1000)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


MODELS = {f.__name__: f for f in (depth, upscaler, unconditional, refiner, of_words, of_classes)}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A pipeline by name, and a folder with it and its translation into our layout."""
    home = tmp_path_factory.mktemp(request.param)
    pipeline = MODELS[request.param](home)
    pipeline.save_pretrained(home / "theirs")
    bundle, layout = read(str(home / "theirs"))
    assert layout == "diffusers"
    write(bundle, home / "ours", "ldm", source=str(home / "theirs"))
    pipeline.set_progress_bar_config(disable=True)
    return request.param, pipeline, home


def test_there_and_back_is_the_identity(model):
    """To diffusers again: every tensor, and the pipeline loads."""
    name, pipeline, home = model
    write(read(str(home / "ours"))[0], home / "again", "diffusers")
    files = [f.relative_to(home / "theirs") for f in (home / "theirs").rglob("*.safetensors")]
    for file in files:
        theirs, again = load_tensors(home / "theirs" / file), load_tensors(home / "again" / file)
        bare = not any(n.startswith("text_model.") for n in theirs) and "text_encoder" in str(file)
        theirs = {n if not bare or n.startswith("text_") else f"text_model.{n}": x for n, x in theirs.items()}
        assert same_weights(theirs, again), file
    elsewhere = {"depth_estimator": None, "feature_extractor": None} if name == "depth" else {}
    back = type(pipeline).from_pretrained(home / "again", **elsewhere)
    assert back.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type
    assert torch.equal(back.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_through_a_single_file_and_back(model):
    name, _, home = model
    layout = "dit" if name == "of_classes" else "compvis"
    first = read(str(home / "ours"))[0]
    write(first, home / "single.safetensors", layout)
    again, found = read(str(home / "single.safetensors"), "Noise" if layout == "dit" else None)
    assert found == layout and same_weights(first.weights, again.weights)
    assert set(first.parts) - set(again.parts) == ({"autoencoder"} if layout == "dit" else set())
    for place in again.parts:
        ours, theirs = first.parts[place].weights, again.parts[place].weights
        assert all(torch.equal(x, theirs[n]) for n, x in ours.items())  # Stable Diffusion 2's tower grows a block, never read
    assert again.recipe["schedule"] == first.recipe["schedule"] and again.recipe["prediction"] == first.recipe["prediction"]
    assert list(again.recipe["condition"]) == list(first.recipe["condition"])


def scored():
    """What the refiner is told beside a prompt, and in the null."""
    sizes = {"original_height": 16, "original_width": 16, "crop_top": 0, "crop_left": 0, "aesthetic_score": 7}
    told = {field: torch.full((2,), size) for field, size in sizes.items()}
    return told | {"negative.aesthetic_score": torch.full((2,), 2.5)}


def pictures(model, ask, noise, scale=3.0, begun=None):
    """Ours: 10 steps of DDIM from the same noise, in [0, 1]; the last 6 where it begins from a picture."""
    guide = CFG(scale) if scale != 1 else Unguided()
    sampler = DDIM(10, grid=GRID)
    with torch.no_grad():
        sampler = sampler if begun is None else FromPicture(sampler, model.autoencoder.encode(begun).mean, 0.6)
        x = sampler(guide(model, ask), model.denoiser.schedule, noise, range(len(noise)))
        return model.autoencoder.decode(x).clamp(-1, 1).add(1).div(2)


def test_it_draws_what_its_pipeline_draws(model, monkeypatch):
    """From the same noise, in float64; where the pipeline begins from a picture, from the mean of the same picture's latents."""
    name, pipeline, home = model
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda told, generator=None: told.mean)
    net, pipeline = load_model(home / "ours").double(), pipeline.to(torch.float64)
    channels, size = (3, 8) if name == "unconditional" else (4, 8)
    noise = unit_noise([3, 4], (channels, size, size)).double()
    words = {"num_inference_steps": 10, "output_type": "pt"}
    texts = {"caption": ["a red apple", "fox"], "negative.caption": ["blurry"] * 2}
    if name == "upscaler":
        small, step = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1, torch.tensor([20, 20])
        other = torch.randn_like(small)
        monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: other)
        prompts = {"negative_prompt": ["blurry"] * 2, "guidance_scale": 3.0, "latents": noise, "noise_level": 20}
        wanted = pipeline(texts["caption"], image=(small + 1) / 2, **prompts, **words).images
        drawn = pictures(net, texts | {"low": small, "step": step, "low_noise": other}, noise)
    elif name in ("depth", "refiner"):
        monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise)
        picture, depths = torch.rand(2, 3, 16, 16).double() * 2 - 1, torch.rand(2, 16, 16).double()
        pipeline.vae.register_to_config(force_upcast=False)
        prompts = {"negative_prompt": ["blurry"] * 2, "guidance_scale": 3.0, "strength": 0.6, "image": (picture + 1) / 2}
        prompts |= {"depth_map": depths} if name == "depth" else {"aesthetic_score": 7.0, "negative_aesthetic_score": 2.5}
        wanted = pipeline(texts["caption"], **prompts, **words).images
        drawn = pictures(net, texts | {"depth": depths[:, None]} if name == "depth" else texts | scored(), noise, begun=picture)
    elif name == "of_words":
        wanted = pipeline(texts["caption"], guidance_scale=3.0, latents=noise, **words).images
        drawn = pictures(net, {"caption": texts["caption"]}, noise)
    elif name == "unconditional":
        monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise)
        wanted = torch.from_numpy(pipeline(2, num_inference_steps=10, output_type="np").images).permute(0, 3, 1, 2)
        drawn = pictures(net, {}, noise, scale=1)
    else:
        monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise)
        for block in pipeline.transformer.transformer_blocks:  # as in the published code; see test_backbone
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        wanted = pipeline([4, 700], guidance_scale=3.0, **words).images
        drawn = pictures(net, {"label": torch.tensor([4, 700])}, noise)
    torch.testing.assert_close(drawn, wanted.double(), atol=1e-4, rtol=0)


# ---- files of DiT, SiT and LightningDiT


def published(home, **settings):
    """A small network in the published layout, and its file."""
    torch.manual_seed(7)
    net = loud(DiT(4, Widths(vector=64), size=8, width=64, depth=2, heads=1, vector=identity, **settings))
    theirs = give(dit.published(net.state_dict(), settings.get("swiglu", False)), net.state_dict())
    theirs |= {dit.TABLE: torch.randn(11, 64)} | ({"feat_rope.freqs_cos": torch.zeros(16, 64)} if settings.get("rotary") else {})
    torch.save({"ema": theirs, "args": argparse.Namespace(lr=1)}, home / "net.pt")
    return net, theirs


def told_to_convert(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["", *map(str, words)])
    main()


LIGHTNING = {"rms_norm": True, "swiglu": True, "rotary": True}


@pytest.mark.parametrize(
    "settings", [{"learn_range": True}, LIGHTNING, {**LIGHTNING, "norm_heads": True}], ids=["sit", "lightning", "heads"]
)
def test_sit_and_lightningdit_run_time_backwards(settings, tmp_path, monkeypatch):
    """x_t = t x + (1 - t) noise there, and the network says x - noise: x_hat = x_t + (1 - t) v."""
    net, theirs = published(tmp_path, **settings)
    their_vae().save_pretrained(tmp_path / "vae")
    words = ["--prediction", "flow"] if "learn_range" in settings else []
    told_to_convert(monkeypatch, tmp_path / "net.pt", tmp_path / "ours", "--to", "ldm", "--autoencoder", tmp_path / "vae", *words)
    model, x, labels = load_model(tmp_path / "ours"), torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    assert type(model.denoiser.level).__name__ == "DataTime"
    t = torch.tensor([0.2, 0.9])
    alpha, _ = model.denoiser.schedule(t)
    with torch.no_grad():
        vector = theirs[dit.TABLE][labels]
        wanted = x + (1 - alpha)[:, None, None, None] * net(x, alpha, Cond(vector=vector))
        torch.testing.assert_close(model.denoiser(x, t, Cond(vector=vector)), wanted, atol=1e-4, rtol=0)
        told = model.condition({"label": torch.tensor([3, 4])}, only=())
    assert torch.equal(told.vector[0], theirs[dit.TABLE][-1])
    told_to_convert(monkeypatch, tmp_path / "ours", tmp_path / "back.safetensors", "--to", "dit")
    assert same_weights(load_tensors(tmp_path / "back.safetensors"), {n: x for n, x in theirs.items() if "feat_rope" not in n})
    with pytest.raises(SystemExit, match="diffusers"):
        told_to_convert(monkeypatch, tmp_path / "ours", tmp_path / "no", "--to", "diffusers")


def test_what_a_dit_file_does_not_say_is_asked_for(tmp_path):
    _, theirs = published(tmp_path, learn_range=True)
    path = str(tmp_path / "net.pt")
    with pytest.raises(ValueError, match="Say --prediction noise or --prediction flow"):
        read(path)
    bundle, layout = read(path, "Noise")
    assert layout == "dit"
    with pytest.raises(ValueError, match=r"holds no autoencoder\. Say whose latents it draws: --autoencoder"):
        write(bundle, tmp_path / "ours", "ldm", source=path)
    with pytest.raises(ValueError, match="that layout is for a U-Net"):
        write(bundle, tmp_path / "one.safetensors", "compvis")
    for wrong, word in (
        (theirs | {"extra": torch.zeros(1)}, "extra"),
        ({n: x for n, x in theirs.items() if n != "pos_embed"}, "pos_embed"),
    ):
        save_tensors(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=word):
            read(str(tmp_path / "wrong.safetensors"), "Noise")


# ---- first stages, and what a file's own buffers tell


@pytest.mark.parametrize("attends", [(), (1,)], ids=["f4", "f8"])
def test_a_vq_first_stage_travels_and_sees_the_same(attends, tmp_path):
    """diffusers' VQModel -> ours -> CompVis' file -> ours -> diffusers: the same tensors, and the same pictures."""
    peer = their_vq(attends=attends)
    peer.save_pretrained(tmp_path / "theirs")
    first = read(str(tmp_path / "theirs"))[0]
    write(first, tmp_path / "one.safetensors", "compvis")
    write(read(str(tmp_path / "one.safetensors"))[0], tmp_path / "ours", "ldm")
    write(read(str(tmp_path / "ours"))[0], tmp_path / "again", "diffusers")
    file = "diffusion_pytorch_model.safetensors"
    assert same_weights(load_tensors(tmp_path / "theirs" / file), load_tensors(tmp_path / "again" / file))
    assert VQModel.from_pretrained(tmp_path / "again").config.num_vq_embeddings == 16
    ours, images = load_autoencoder(str(tmp_path / "ours")), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = peer.encode(images).latents
        torch.testing.assert_close(ours.encode(images).mean, latents, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.decode(latents), peer.decode(latents).sample, atol=1e-4, rtol=0)


def test_statistics_by_channel_have_no_place_in_a_vq_elsewhere(tmp_path):
    unconditional(tmp_path).save_pretrained(tmp_path / "theirs")
    bundle = read(str(tmp_path / "theirs"))[0]
    bundle.parts["autoencoder"].weights["std"] = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="statistics differ by channel"):
        write(bundle, tmp_path / "out", "diffusers")
    write(Bundle(None, {}, bundle.parts), tmp_path / "alone", "diffusers")


def test_a_file_tells_its_own_betas_and_scale(tmp_path):
    """As LSUN churches' does, whose scale was measured in training; without a yaml beside it."""
    unconditional(tmp_path).save_pretrained(tmp_path / "theirs")
    bundle = read(str(tmp_path / "theirs"))[0]
    write(bundle, tmp_path / "one.safetensors", "compvis")
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float()
    own = {"betas": betas, "scale_factor": torch.tensor(0.5)}
    save_tensors(load_tensors(tmp_path / "one.safetensors") | own, tmp_path / "bare.safetensors")
    again = read(str(tmp_path / "bare.safetensors"))[0]
    assert again.recipe["schedule"] == bundle.recipe["schedule"] and again.parts["autoencoder"].weights["std"].tolist() == [2] * 3
    save_tensors(
        load_tensors(tmp_path / "bare.safetensors") | {"betas": torch.linspace(1e-4, 0.02, 1000)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(ValueError, match="square roots are linear"):
        read(str(tmp_path / "b.safetensors"))


def test_class_to_picture_travels_in_a_single_file(tmp_path):
    """LDM-4 of ImageNet: the class table is `cond_stage_model.embedding`; diffusers has no pipeline for it."""
    settings = {"width": 32, "mult": [1, 2], "res_blocks": 1, "depth": [0, 1], "heads": 1}
    torch.manual_seed(8)
    net = loud(UNet(3, Widths(tokens=12), **settings))
    label = {"_target_": "ldm.condition.label.Label", "classes": 9, "width": 12}
    schedule = {"_target_": "ldm.schedule.ScaledLinear", "beta_start": 0.0015, "beta_end": 0.0195}
    their_vq().save_pretrained(tmp_path / "vq")
    weights = {BACKBONE + n: x for n, x in net.state_dict().items()} | {
        "conditioner.embedders.label.table.weight": torch.randn(10, 12)
    }
    bundle = Bundle(
        recipe_of(NETWORK.node(settings), {"label": label}, "Noise", schedule), weights, read(str(tmp_path / "vq"))[0].parts
    )
    write(bundle, tmp_path / "one.safetensors", "compvis")
    assert load_tensors(tmp_path / "one.safetensors")["cond_stage_model.embedding.weight"].shape == (10, 12)
    again = read(str(tmp_path / "one.safetensors"))[0]
    assert same_weights(again.weights, bundle.weights) and again.recipe["condition"] == {"label": label}
    with pytest.raises(ValueError, match=r"no pipeline for the conditions \['Label'\]"):
        write(again, tmp_path / "out", "diffusers")
    write(again, tmp_path / "ours", "ldm")
    assert load_model(tmp_path / "ours").condition({"label": torch.tensor([4])}).tokens.shape == (1, 1, 12)


def test_training_noises_the_small_picture_by_a_step_of_its_own():
    """The upscaler's `low`, `step` and noise come from the picture and its position; the published most is 350."""
    told = Upscale(SimpleNamespace(factor=4), width=8)
    batch = {"image": torch.rand(64, 3, 16, 16) * 2 - 1}
    made = told.derive(batch, Draw(0, torch.arange(64), 64))
    again = told.derive({"image": batch["image"][5:6]}, Draw(0, torch.tensor([5]), 64))
    assert all(torch.equal(again[name], made[name][5:6]) for name in ("step", "low_noise")) and made["low"].shape == (64, 3, 4, 4)
    assert 0 <= made["step"].min() < 60 and 290 < made["step"].max() <= 350
    cond = told([made[field] for field in told.key], torch.zeros(64, dtype=torch.bool))
    assert cond.spatial.shape == (64, 3, 4, 4) and torch.equal(cond.vector, told.table(made["step"]))
    with pytest.raises(ValueError, match="noise steps are 0 to 999"):
        told([made["low"], made["step"] + 1000, made["low_noise"]], torch.zeros(64, dtype=torch.bool))
