"""ControlNets of others: what they add is what diffusers adds, in one network and in whole pipelines; there and back."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

from helpers.family import loud, their_pipeline_and_ours, their_unet
from ldm.build import load_model
from ldm.drawing.generate import unit_noise
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, read_json, save_tensors, write_json
from ldm.guidance.cfg import CFG
from ldm.guidance.within import Within
from ldm.interop.__main__ import main
from ldm.interop.adapter.controlnet import ties_of
from ldm.interop.convert import read
from ldm.interop.find import network_of
from ldm.interop.tie import give
from ldm.sampler.ddim import DDIM
from ldm.sampler.grid import Leading
from ldm.types import Cond

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd2", "xl", "inpaint")]
G = torch.Generator().manual_seed(0)
X, STEP = torch.randn(2, 9, 8, 8, generator=G).double(), torch.tensor([300.0, 20.0])
HINT = torch.rand(2, 3, 16, 16, generator=G).double()
FACTOR = (16, 32)  # channels of hints for an autoencoder of factor 2


def their_control(unet, seed, folder, order="rgb", pool=False):
    """diffusers' ControlNet of a U-Net, loud, in a folder."""
    torch.manual_seed(seed)
    net = loud(ControlNetModel.from_unet(unet, order, FACTOR))
    net.register_to_config(global_pool_conditions=pool)
    net.save_pretrained(folder)
    return net.double()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> diffusers' pipeline; ours of it in `ours`; ControlNets of theirs in `edges`, `depth`, `mixed`."""

    @cache
    def make(kind):
        home = tmp_path_factory.mktemp(kind)
        pipeline = their_pipeline_and_ours(kind, home)
        unet = their_unet((True, False), 64) if kind == "inpaint" else pipeline.unet
        edges, depth = (their_control(unet, i, home / name) for i, name in enumerate(("edges", "depth")))
        mixed = their_control(unet, 3, home / "mixed", "bgr", pool=True)
        pipeline.set_progress_bar_config(disable=True)
        return SimpleNamespace(kind=kind, pipeline=pipeline.to(torch.float64), home=home, edges=edges, depth=depth, mixed=mixed)

    return make


def loaded(of, *adapters):
    words = [f"{name}={of.home / name}:{strength}" for name, strength in adapters]
    return load_model(of.home / "ours", adapters=words).double()


def one_pass(of, model, asked):
    """Theirs and ours, told the same; asked: (name, their ControlNet, strength, guess) of each."""
    unet = of.pipeline.unet
    tokens = torch.randn(2, 5, unet.config.cross_attention_dim, generator=G).double()
    x, told, vector = X[:, : unet.config.in_channels], {}, None
    if of.kind == "xl":
        ids, pooled = torch.arange(12.0).reshape(2, 6).double(), torch.randn(2, 48, generator=G).double()
        told = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        vector = torch.cat((pooled, unet.add_time_proj(ids.flatten()).reshape(2, -1).double()), 1)
    down, mid, maps = None, 0, [x]
    for name, net, strength, guess in asked:
        d, m = net(x[:, :4], STEP, tokens, HINT, strength, guess_mode=guess, return_dict=False, **told)
        down, mid = d if down is None else [a + b for a, b in zip(down, d)], mid + m
        embedder = model.conditioner.embedders[name]
        batch = embedder.derive({name: HINT * 2 - 1}, None) | {name: HINT * 2 - 1}
        maps.append(embedder([batch[field] for field in embedder.key], torch.zeros(2, dtype=torch.bool)).spatial)
    wanted = unet(x, STEP, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid, **told).sample
    return wanted, model.denoiser.backbone(torch.cat(maps, 1), STEP, Cond(tokens=tokens, vector=vector))


@pytest.mark.parametrize("kind", ["sd1", *SLOW])
@torch.no_grad()
def test_the_controlled_unet_is_theirs(made, kind):
    """One and two, with strengths; of another order of colours, pooled; guessing."""
    of = made(kind)
    wanted, found = one_pass(of, loaded(of, ("edges", 0.7)), [("edges", of.edges, 0.7, False)])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    pair = [("depth", of.depth, 0.4, False), ("mixed", of.mixed, 1.3, False)]
    wanted, found = one_pass(of, loaded(of, ("depth", 0.4), ("mixed", 1.3)), pair)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    model = loaded(of, ("edges", 0.7))
    model.denoiser.backbone.nets["edges"].guess = True
    wanted, found = one_pass(of, model, [("edges", of.edges, 0.7, True)])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_gradients_are_theirs(made):
    """Of every tensor, after the same loss."""
    of = made("sd1")
    model, bundle = loaded(of, ("edges", 0.7)), read(str(of.home / "ours"))[0]
    parts = model.denoiser.backbone.nets["edges"], model.conditioner.embedders["edges"]
    for result in one_pass(of, model.requires_grad_(True), [("edges", of.edges, 0.7, False)]):
        result.square().mean().backward()
    ours = {name: p.grad for part in parts for name, p in part.named_parameters()}
    theirs = {name: p.grad for name, p in of.edges.named_parameters()}
    found = give(ties_of(network_of(bundle), bundle, False, 6), ours)
    assert found.keys() == theirs.keys()
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    assert all((found[name] - grad).abs().max() < 1e-5 * largest for name, grad in theirs.items())


@pytest.mark.parametrize("kind", ["sd1", *SLOW])
def test_files_travel_there_and_back_to_the_bit(made, kind, tmp_path):
    """diffusers' folder -> ours -> a single file -> ours -> a folder; a whole model's control part, and one without prefix."""
    of, base = made(kind), ["--base", str(made(kind).home / "ours")]
    main([str(of.home / "edges"), str(tmp_path / "ours"), "--to", "ldm", *base])
    main([str(tmp_path / "ours"), str(tmp_path / "single.safetensors"), "--to", "compvis", *base])
    main([str(tmp_path / "single.safetensors"), str(tmp_path / "again"), "--to", "diffusers", *base])
    theirs, again = (load_tensors(f / "diffusion_pytorch_model.safetensors") for f in (of.home / "edges", tmp_path / "again"))
    assert theirs.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in theirs.items())
    single = load_tensors(tmp_path / "single.safetensors")
    assert "control_model.input_hint_block.0.weight" in single and "control_model.zero_convs.0.0.weight" in single
    assert not [
        n for n, x in ControlNetModel.from_pretrained(tmp_path / "again").state_dict().items() if not torch.equal(x, theirs[n])
    ]
    bare = {name.removeprefix("control_model."): x for name, x in single.items()}
    save_tensors(bare, tmp_path / "bare.safetensors")
    save_tensors(
        single | {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.ones(3)}, tmp_path / "whole.safetensors"
    )
    ours = load_tensors(tmp_path / "ours" / "model.safetensors")
    for file in ("bare", "whole"):
        main([str(tmp_path / f"{file}.safetensors"), str(tmp_path / file), "--to", "ldm", *base])
        back = load_tensors(tmp_path / file / "model.safetensors")
        assert back.keys() == ours.keys() and all(torch.equal(x, ours[name]) for name, x in back.items())


def drawn(model, ask, noise, guidance):
    with torch.no_grad():
        x = DDIM(10, grid=Leading(last=1 / 1000))(guidance(model, ask), model.denoiser.schedule, noise, range(len(noise)))
        return model.autoencoder.decode(x).clamp(-1, 1).add(1).div(2)


OTHERS = [("sd1", "guess"), ("sd1", "two"), ("sd1", "half"), ("xl", "plain"), ("xl", "two")]


@pytest.mark.parametrize("kind, way", [("sd1", "plain"), *(pytest.param(*way, marks=pytest.mark.slow) for way in OTHERS)])
def test_it_draws_what_their_pipeline_draws(made, kind, way):
    """10 steps of DDIM at scale 7.5 with a negative prompt, in float64."""
    of = made(kind)
    names = ("edges", "depth") if way == "two" else ("edges",)
    nets = [getattr(of, name) for name in names]
    parts = {k: v for k, v in of.pipeline.components.items() if k != "image_encoder"}
    class_ = StableDiffusionXLControlNetPipeline if kind == "xl" else StableDiffusionControlNetPipeline
    pipeline = class_(
        **parts, controlnet=nets if len(nets) > 1 else nets[0], **({} if kind == "xl" else {"requires_safety_checker": False})
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = unit_noise([3, 4], (4, 8, 8)).double()
    hints = [HINT, HINT.flip(3)][: len(names)]
    scales = [0.8, 0.5][: len(names)]
    texts = {"caption": ["a red apple", "fox"], "negative.caption": ["blurry"] * 2}
    extra = {"guess_mode": way == "guess", "control_guidance_end": 0.5 if way == "half" else 1.0}
    wanted = pipeline(
        texts["caption"],
        image=hints if len(hints) > 1 else hints[0],
        negative_prompt=["blurry"] * 2,
        latents=noise,
        guidance_scale=7.5,
        num_inference_steps=10,
        output_type="pt",
        controlnet_conditioning_scale=scales if len(scales) > 1 else scales[0],
        **extra,
    ).images
    model = loaded(of, *zip(names, [f"{scale}:guess" if way == "guess" else scale for scale in scales]))
    guidance = CFG(7.5)
    if way == "half":
        t = DDIM(10, grid=Leading(last=1 / 1000)).times(model.denoiser.schedule)
        alpha, sigma = model.denoiser.schedule(t[4:6])
        guidance = Within("edges", low=float((sigma / alpha).mean()), inner=CFG(7.5))
    ask = texts | {name: hint * 2 - 1 for name, hint in zip(names, hints)}
    if kind == "xl":
        sizes = {
            "original_height": 16,
            "original_width": 16,
            "crop_top": 0,
            "crop_left": 0,
            "target_height": 16,
            "target_width": 16,
        }
        ask |= {field: torch.full((2,), size) for field, size in sizes.items()}
    torch.testing.assert_close(drawn(model, model.conditioner.fill(ask), noise, guidance), wanted.double(), atol=1e-4, rtol=0)


def test_what_is_no_such_controlnet_is_named(made, tmp_path):
    """Each by its own name; of another family, or with other heads; with a tensor too many."""
    of = made("sd1")
    theirs = load_tensors(of.home / "edges" / "diffusion_pytorch_model.safetensors")
    for key, word in (("lora_controlnet", "a Control-LoRA"), ("task_embedding", "a ControlNet Union"), ("lllite_a", "LLLite")):
        save_tensors({key: torch.zeros(1)}, tmp_path / f"{key}.safetensors")
        with pytest.raises(Refusal, match=f"is .*{word}.*; whole ControlNets"):
            load_model(of.home / "ours", adapters=f"edges={tmp_path / key}.safetensors")
    config = read_json(of.home / "edges" / "config.json")
    name = next(n for n in theirs if n.endswith("attn2.to_k.weight"))
    wide = theirs | {n: torch.zeros(len(x), 768) for n, x in theirs.items() if ".attn2.to_" in n and n[-8] in "kv"}
    for folder, tensors, settings, words in (
        ("more", theirs | {"extra.weight": torch.ones(1)}, {}, "1 of its tensors are of nothing here, such as extra.weight"),
        ("less", {n: x for n, x in theirs.items() if n != name}, {}, "another U-Net: 1 tensors are missing"),
        ("wide", wide, {}, r"another U-Net: .*\(32, 768\); \(32, 64\) was wanted.*it is for Stable Diffusion 1"),
        ("heads", theirs, {"attention_head_dim": 4}, r"has \[4\] heads, level by level, and this U-Net \[8\]"),
        ("nan", theirs | {name: theirs[name] * float("nan")}, {}, "not finite"),
    ):
        save_tensors(tensors, tmp_path / folder / "model.safetensors")
        write_json(config | settings, tmp_path / folder / "config.json")
        with pytest.raises(Refusal, match=words):
            load_model(of.home / "ours", adapters=f"edges={tmp_path / folder}")
