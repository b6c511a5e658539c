"""Whole models on transformers, Stable Diffusion 3, 3.5, Flux and PixArt: there, back, and each draws what its pipeline draws."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)

from helpers.family import loud, their_text, their_tokenizer, their_vae
from helpers.language import in_full, t5_tokenizer, their_t5
from helpers.modern import their_flux, their_mmdit, their_pixart
from ldm.build import load_model
from ldm.drawing.generate import unit_noise
from ldm.files.folder import load_tensors, save_tensors
from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.interop.convert import check, describe, read, write
from ldm.sampler.ddim import DDIM
from ldm.sampler.euler import Euler
from ldm.sampler.grid import BySize, Leading, Shifted, Uniform

HEADS = {"attention_head_dim": 64, "caption_projection_dim": 128}  # as published, so that a single file may be read
WIDE = {"attention_head_dim": 64, "cross_attention_dim": 128}
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def stage(scale, shift):
    torch.manual_seed(9)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    said = {"scaling_factor": scale, "shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False}
    return loud(AutoencoderKL(block_out_channels=[32, 64], latent_channels=4, layers_per_block=1, **kinds, **said))


def sd3(home, t5=True, **settings):
    net = their_mmdit(joint_attention_dim=256, pooled_projection_dim=160, **HEADS, **settings)
    towers = {"text_encoder": their_text(projection=48), "text_encoder_2": their_text("gelu", 128, projection=112)}
    words = {f"tokenizer{s}": their_tokenizer(home / f"w{s}", "!" if s else "<|endoftext|>") for s in ("", "_2")}
    more = {"text_encoder_3": (t5 and their_t5(256)) or None, "tokenizer_3": (t5 and t5_tokenizer()) or None}
    more |= {"vae": stage(1.5305, 0.0609)}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=net, scheduler=scheduler, **towers, **words, **more)


def flux(home, guided):
    net = their_flux(guided, joint_attention_dim=256, pooled_projection_dim=64)
    scheduler = FlowMatchEulerDiscreteScheduler(**(DYNAMIC if guided else {}))
    words = {"tokenizer": their_tokenizer(home / "w"), "tokenizer_2": t5_tokenizer()}
    towers = {"text_encoder": their_text(), "text_encoder_2": their_t5(256)}
    return FluxPipeline(transformer=net, scheduler=scheduler, vae=stage(0.3611, 0.1159), **words, **towers)


def pixart(home):
    net = their_pixart(**WIDE, caption_channels=256, sample_size=64, interpolation_scale=1)
    betas = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    towers = {"text_encoder": their_t5(256), "tokenizer": t5_tokenizer()}
    return PixArtSigmaPipeline(transformer=net, scheduler=DDIMScheduler(**betas), vae=their_vae(scaling_factor=0.13025), **towers)


MODELS = {
    "sd3": sd3,
    "sd3.5": lambda home: sd3(home, again=(0, 1), qk_norm="rms_norm"),
    "sd3 without": lambda home: sd3(home, t5=False),
    "schnell": lambda home: flux(home, False),
    "dev": lambda home: flux(home, True),
    "pixart": pixart,
}
SINGLE = {"sd3": "sd3", "sd3 without": "sd3", "sd3.5": "sd3", "schnell": "flux", "dev": "flux", "pixart": "pixart"}


SLOW = ("sd3.5", "sd3 without", "schnell")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS])
def model(request, tmp_path_factory):
    """A pipeline by name, and a folder with it and its translation into our layout."""
    home = tmp_path_factory.mktemp(request.param)
    pipeline = MODELS[request.param](home)
    pipeline.save_pretrained(home / "theirs")
    bundle, layout = read(str(home / "theirs"))
    check(bundle, str(home / "theirs"), None)
    assert layout == "diffusers"
    write(bundle, home / "ours", "ldm", source=str(home / "theirs"))
    pipeline.set_progress_bar_config(disable=True)
    return request.param, pipeline, home


def test_there_and_back_is_the_identity(model):
    """To diffusers again: every tensor and every setting of the network and its autoencoder; the pipeline loads."""
    name, pipeline, home = model
    write(read(str(home / "ours"))[0], home / "again", "diffusers")
    for file in (f.relative_to(home / "theirs") for f in (home / "theirs").rglob("*.safetensors")):
        theirs, again = load_tensors(home / "theirs" / file), load_tensors(home / "again" / file)
        again = {n if n in theirs else n.removeprefix("text_model."): x for n, x in again.items()}
        assert theirs.keys() == again.keys() and all(torch.equal(x, again[n]) for n, x in theirs.items()), file
    lacking = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3 without" else {}
    back = type(pipeline).from_pretrained(home / "again", **lacking)
    for part in ("transformer", "vae"):
        theirs, again = (json.loads(json.dumps(dict(getattr(pipe, part).config))) for pipe in (pipeline, back))
        other = {n for n, v in theirs.items() if n[0] != "_" and again[n] != v}
        assert not other - {"sample_size", "force_upcast", "interpolation_scale"}, other
    assert {n: v for n, v in back.scheduler.config.items() if "shift" in n} == {
        n: v for n, v in pipeline.scheduler.config.items() if "shift" in n
    }


def test_through_a_single_file_and_back(model):
    name, _, home = model
    first = read(str(home / "ours"))[0]
    write(first, home / "single.safetensors", SINGLE[name])
    again, layout = read(str(home / "single.safetensors"), "Noise" if name == "pixart" else None)
    backbone = again.weights
    assert layout == SINGLE[name] and describe(again)
    assert backbone.keys() == first.weights.keys() and all(torch.equal(x, first.weights[n]) for n, x in backbone.items())
    unsaid = {"_target_", "vector", "axes", "size"}
    built, wanted = (b.recipe["backbone"] for b in (again, first))
    assert {n: v for n, v in built.items() if n not in unsaid} == {n: v for n, v in wanted.items() if n not in unsaid}
    assert list(again.recipe["condition"]) == list(first.recipe["condition"])
    for room in ("schedule", "prediction", "level"):
        assert again.recipe[room] == first.recipe[room]
    for place, part in again.parts.items():
        theirs = first.parts[place].weights
        assert part.weights.keys() == theirs.keys(), place
        assert all(torch.equal(x, theirs[n]) for n, x in part.weights.items() if n != "count"), place
    alone = {n: x for n, x in load_tensors(home / "single.safetensors").items() if not n.startswith("text_encoders.")}
    save_tensors(alone, home / "alone.safetensors")  # as sd3_medium.safetensors is
    bare = read(str(home / "alone.safetensors"), "Noise" if name == "pixart" else None)[0]
    check(bare, "alone", None)
    if name == "sd3":  # as sd3_medium_incl_clips.safetensors is: its CLIPs stand beside the published T5
        save_tensors(
            {n: x for n, x in load_tensors(home / "single.safetensors").items() if "t5xxl" not in n}, home / "clips.safetensors"
        )
        check(read(str(home / "clips.safetensors"))[0], "clips", None)
    assert set(bare.parts) <= {"autoencoder"} and list(bare.recipe["condition"]) == list(first.recipe["condition"])


SAMPLERS = {"sd3": Euler(10, grid=Shifted(3.0)), "schnell": Euler(10, grid=Uniform()), "dev": Euler(10, grid=BySize())}
SAMPLERS |= {"sd3 without": SAMPLERS["sd3"], "sd3.5": SAMPLERS["sd3"], "pixart": DDIM(10, grid=Leading(last=1 / 1000))}


def wanted(name, pipeline, noise, prompts):
    """The pipeline's pictures in [0, 1]."""
    words = {"num_inference_steps": 10, "output_type": "pt", "height": 16, "width": 24, "generator": torch.Generator()}
    if name in ("schnell", "dev"):
        pipeline.tokenizer_max_length = 16
        packed = FluxPipeline._pack_latents(noise, *noise.shape)
        return pipeline(prompts, latents=packed, guidance_scale=4.0, **words).images
    words |= {"negative_prompt": ["blurry"] * 2, "guidance_scale": 3.0, "latents": noise}
    if name == "pixart":
        return pipeline(prompts, use_resolution_binning=False, clean_caption=False, **words).images
    pipeline.tokenizer_max_length = 16
    return pipeline(prompts, **words).images


def test_it_draws_what_its_pipeline_draws(model):
    """From prompt to picture, from the same noise, 10 steps, in float64."""
    name, pipeline, home = model
    net, pipeline = load_model(in_full(home / "ours")).double(), pipeline.to(torch.float64)
    noise, prompts = unit_noise([3, 4], (4, 8, 12)).double(), ["a red apple", "fox"]
    theirs = wanted(name, pipeline, noise, prompts)
    alone = name in ("schnell", "dev")
    guide, ask = Unguided() if alone else CFG(3.0), {"caption": prompts}
    ask |= {} if alone else {"negative.caption": ["blurry"] * 2}
    ask |= {"guidance": torch.full((2,), 4.0)} if name == "dev" else {}
    with torch.no_grad():
        x = SAMPLERS[name](guide(net, ask), net.denoiser.schedule, noise, range(2))
        ours = net.autoencoder.decode(x).clamp(-1, 1).add(1).div(2)
    torch.testing.assert_close(ours, theirs.double(), atol=1e-4, rtol=0)


def test_how_its_steps_are_spaced_is_said(model):
    name, _, home = model
    grid = read(str(home / "theirs"))[0].grid
    assert grid == {"sd3": "shifted sampler.grid.shift=3.0", "schnell": "uniform", "dev": "by_size"}.get(name, grid)
    config = json.loads((home / "ours" / "config.json").read_text())
    assert config["level"]["_target_"].endswith("Timestep" if name == "pixart" else "NoiseTime")
