"""IP-Adapters of others: what is drawn with a picture as a prompt is what diffusers draws; every tensor is used or named."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers.family import loud, their_pipeline_and_ours
from ldm.build import load_model
from ldm.drawing.generate import unit_noise
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, read_model, save_tensors
from ldm.guidance.cfg import CFG
from ldm.interop.adapters import read_adapter
from ldm.sampler.ddim import DDIM
from ldm.sampler.grid import Leading
from ldm.tower.clip import MEAN, STD

SIDE, SEEN, EMBEDDED, INNER = 16, 32, 24, 64
PATCHES = 1 + (SIDE // 8) ** 2
KINDS = ("linear", "resampler", "mlp")
TEXT = {"caption": ["a red apple"], "negative.caption": ["blurry"]}


def their_tower(folder):
    torch.manual_seed(11)
    config = CLIPVisionConfig(
        hidden_size=SEEN,
        intermediate_size=48,
        projection_dim=EMBEDDED,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        hidden_act="gelu",
    )
    loud(CLIPVisionModelWithProjection(config)).save_pretrained(folder)


def numbers(g, *shape):
    x = torch.randn(*shape, generator=g)
    return x / shape[-1] ** 0.5 if len(shape) > 1 else x


def their_file(unet, kind):
    """The published layout, as h94/IP-Adapter has it: each attention to a text, counted as diffusers counts its processors."""
    g, width = torch.Generator().manual_seed(KINDS.index(kind)), unet.config.cross_attention_dim
    places = [unet.get_submodule(n.removesuffix(".processor")) for n in unet.attn_processors if ".attn2." in n]
    held = {
        f"ip_adapter.{2 * i + 1}.to_{leaf}_ip.weight": numbers(g, *place.to_k.weight.shape)
        for i, place in enumerate(places)
        for leaf in "kv"
    }
    shapes = {
        "linear": {
            "proj.weight": (4 * width, EMBEDDED),
            "proj.bias": (4 * width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        },
        "mlp": {"proj.0.weight": (SEEN, SEEN), "proj.0.bias": (SEEN,), "proj.2.weight": (width, SEEN), "proj.2.bias": (width,)}
        | {"proj.3.weight": (width,), "proj.3.bias": (width,)},
        "resampler": {"latents": (1, 3, INNER), "proj_in.weight": (INNER, SEEN), "proj_in.bias": (INNER,)}
        | {"proj_out.weight": (width, INNER), "proj_out.bias": (width,), "norm_out.weight": (width,), "norm_out.bias": (width,)}
        | {f"layers.{i}.0.norm{j}.{end}": (INNER,) for i in range(4) for j in (1, 2) for end in ("weight", "bias")}
        | {
            f"layers.{i}.0.to_{leaf}.weight": (n * INNER, INNER)
            for i in range(4)
            for leaf, n in (("q", 1), ("kv", 2), ("out", 1))
        }
        | {f"layers.{i}.1.0.{end}": (INNER,) for i in range(4) for end in ("weight", "bias")}
        | {f"layers.{i}.1.1.weight": (4 * INNER, INNER) for i in range(4)}
        | {f"layers.{i}.1.3.weight": (INNER, 4 * INNER) for i in range(4)},
    }[kind]
    return held | {f"image_proj.{name}": numbers(g, *shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind of model -> diffusers' pipeline, and the folder of ours, with files of each kind of IP-Adapter in `models`."""

    @cache
    def make(kind):
        home = tmp_path_factory.mktemp(kind)
        pipeline = their_pipeline_and_ours(kind, home)
        their_tower(home / "models" / "image_encoder")
        for name in KINDS:
            save_tensors(their_file(pipeline.unet, name), home / "models" / f"{name}.safetensors")
        torch.manual_seed(5)
        loud(ControlNetModel.from_unet(pipeline.unet, "rgb", (16, 32))).save_pretrained(home / "edges")
        pipeline.set_progress_bar_config(disable=True)
        return SimpleNamespace(kind=kind, home=home, pipeline=pipeline.to(torch.float64))

    return make


def picture(seed):
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def normal(x):
    mean, std = (x.new_tensor(part)[:, None, None] for part in (MEAN, STD))
    return (x / 2 + 0.5 - mean) / std


def drawn(model, ask, steps):
    noise = unit_noise([3], (4, 8, 8)).double()
    with torch.no_grad():
        x = DDIM(steps, grid=Leading(last=1 / 1000))(
            CFG(7.5)(model, model.conditioner.fill(ask)), model.denoiser.schedule, noise, [3]
        )
        return model.autoencoder.decode(x).clamp(-1, 1).add(1).div(2)


WAYS = [("sd1", ("linear",), 2), ("sd1", ("resampler",), 2)]
LONG = [
    ("sd1", ("mlp",), 2),
    ("sd1", ("linear", "resampler"), 10),
    ("sd2", ("resampler",), 10),
    ("xl", ("linear",), 10),
    ("xl", ("mlp", "linear"), 10),
]


@pytest.mark.parametrize("kind, names, steps", [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in LONG)])
def test_it_draws_what_their_pipeline_draws(made, kind, names, steps):
    """DDIM at scale 7.5 with a negative prompt, in float64; strengths other than 1; several together."""
    of = made(kind)
    pictures, scales = [picture(i) for i in range(len(names))], [0.7, 0.4][: len(names)]
    files = [f"{name}.safetensors" for name in names]
    of.pipeline.load_ip_adapter(str(of.home), "models", files)
    of.pipeline.to(torch.float64).set_ip_adapter_scale(scales)
    wanted = of.pipeline(
        TEXT["caption"],
        negative_prompt=TEXT["negative.caption"],
        ip_adapter_image=[normal(x) for x in pictures],
        latents=unit_noise([3], (4, 8, 8)).double(),
        guidance_scale=7.5,
        num_inference_steps=steps,
        output_type="pt",
    ).images
    of.pipeline.unload_ip_adapter()
    words = [f"{name}={of.home / 'models' / name}.safetensors:{scale}" for name, scale in zip(names, scales)]
    model = load_model(of.home / "ours", adapters=words).double()
    ask = TEXT | dict(zip(names, pictures))
    if kind == "xl":
        sizes = {"original_height": 16, "original_width": 16, "crop_top": 0, "crop_left": 0, "target_height": 16}
        ask |= {field: torch.full((1,), size) for field, size in (sizes | {"target_width": 16}).items()}
    torch.testing.assert_close(drawn(model, ask, steps), wanted.double(), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("style", "edges"), ("edges", "style")])
def test_beside_a_controlnet(made, names):
    """Which is told of the text alone; in either order of adapters=."""
    of, hint = made("sd1"), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(8)).double()
    net = ControlNetModel.from_pretrained(of.home / "edges").double()
    pipeline = StableDiffusionControlNetPipeline(**of.pipeline.components, controlnet=net, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(str(of.home), "models", "linear.safetensors")
    pipeline.to(torch.float64).set_ip_adapter_scale(0.7)
    wanted = pipeline(
        TEXT["caption"],
        negative_prompt=TEXT["negative.caption"],
        image=hint,
        ip_adapter_image=normal(picture(0)),
        latents=unit_noise([3], (4, 8, 8)).double(),
        guidance_scale=7.5,
        num_inference_steps=4,
        output_type="pt",
    ).images
    pipeline.unload_ip_adapter()
    words = {"style": f"style={of.home / 'models' / 'linear.safetensors'}:0.7", "edges": f"edges={of.home / 'edges'}"}
    model = load_model(of.home / "ours", adapters=[words[name] for name in names]).double()
    found = drawn(model, TEXT | {"edges": hint * 2 - 1, "style": picture(0)}, 4)
    torch.testing.assert_close(found, wanted.double(), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def base(made):
    """Ours without adapters: its recipe and weights by name."""
    return read_model(made("sd1").home / "ours")


def given(of, file, base, name=None):
    return read_adapter(str(file), name, *base)[0]


def test_a_strength_is_each_requests_own_and_nothing_at_0(made):
    """To the bit; the picture stays unheard at 0, and dropped pictures are told as nothing seen."""
    of = made("sd1")
    model = load_model(of.home / "ours", adapters=f"{of.home / 'models' / 'linear.safetensors'}:0.7")
    plain, g = load_model(of.home / "ours"), torch.Generator().manual_seed(1)
    ask = {"caption": ["a fox"] * 2, "image_prompt": torch.cat([picture(0), picture(1)]).float()}
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor(0.5)
    with torch.no_grad():
        says = [
            model.denoiser(x, t, model.condition(ask | {"image_prompt_strength": torch.tensor(strengths)}))
            for strengths in ([0.0, 0.0], [0.7, 0.7], [0.0, 0.7])
        ]
        usual = model.denoiser(x, t, model.condition(model.conditioner.fill(ask)))
        assert torch.equal(says[0], plain.denoiser(x, t, plain.condition(ask)))
    assert torch.equal(says[1], usual) and not torch.equal(usual, says[0])
    torch.testing.assert_close(says[2], torch.cat([says[0][:1], usual[1:]]), atol=1e-5, rtol=0)
    assert model.conditioner.embedders["image_prompt"].input("image_prompt").kind == "picture"
    with pytest.raises(Refusal, match=r"ask\.image_prompt=FILE must be said"):
        model.conditioner.embedders["image_prompt"].check({})


def test_pictures_are_cut_as_clips_see_them(made):
    """The shorter side scaled, the middle taken, as CLIPImageProcessor does it."""
    of, g = made("sd1"), torch.Generator().manual_seed(2)
    rough = torch.rand(1, 3, 6, 9, generator=g)
    pixels = torch.nn.functional.interpolate(rough, (40, 66), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0).mul(255).byte()
    image = Image.fromarray(np.asarray(pixels))
    embedder = load_model(of.home / "ours", adapters=str(of.home / "models" / "linear.safetensors")).conditioner.embedders[
        "image_prompt"
    ]
    wanted = CLIPImageProcessor(size=SIDE, crop_size=SIDE)(image, return_tensors="pt").pixel_values
    found = normal(embedder.read("image_prompt", [image], (32, 32)))
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 0.05


def test_the_pickle_holds_the_same(made, base, tmp_path):
    """As published, two tables in one; and half precision beside it."""
    of = made("sd1")
    (tmp_path / "image_encoder").symlink_to(of.home / "models" / "image_encoder")
    flat = load_tensors(of.home / "models" / "resampler.safetensors")
    halves = {"image_proj": {}, "ip_adapter": {}}
    for name, x in flat.items():
        part, _, leaf = name.partition(".")
        halves[part][leaf] = x
    torch.save(halves, tmp_path / "plus.bin")
    wanted, found = (given(of, f, base) for f in (of.home / "models" / "resampler.safetensors", tmp_path / "plus.bin"))
    assert found.node == wanted.node and found.node["prompt"]["tokens"] == 3 and found.node["prompt"]["inner"] == INNER
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(x, wanted.tensors[name]) for name, x in found.tensors.items())


def test_what_is_no_such_ip_adapter_is_named(made, base, tmp_path):
    """By its own name, or the tensor that does not fit; an image tower of another width, or none."""
    of = made("sd1")
    theirs = load_tensors(of.home / "models" / "linear.safetensors")
    (tmp_path / "image_encoder").symlink_to(of.home / "models" / "image_encoder")
    first = "ip_adapter.1.to_k_ip.weight"
    wide = {n: torch.zeros(len(x), 768) if n.startswith("ip_adapter.") else x for n, x in theirs.items()}
    for tensors, words in (
        ({"image_proj.proj.0.weight": torch.ones(2, 2), "image_proj.norm.weight": torch.ones(2)}, r"of faces \(FaceID\)"),
        ({"ip_adapter.double_blocks.0.k.weight": torch.ones(2, 2)}, r"of a transformer \(Flux\)"),
        (theirs | {"image_proj.more": torch.ones(1)}, "1 of its tensors are of nothing here, such as image_proj.more"),
        ({n: x for n, x in theirs.items() if n != first}, "1 tensors are missing, such as ip_adapter.1.to_k_ip.weight"),
        (wide, r"another U-Net: .*\(32, 768\); \(32, 64\) was wanted.*it is for Stable Diffusion 1"),
        (theirs | {first: theirs[first] * float("nan")}, "not finite"),
        (theirs | {"image_proj.proj.weight": torch.ones(256, 99)}, r"image tower 99 wide.*there are .*image_encoder \(24\)"),
        ({"image_proj.strange": torch.ones(1)}, "in a way that is not known here"),
    ):
        save_tensors(tensors, tmp_path / "file.safetensors")
        with pytest.raises(Refusal, match=words):
            given(of, tmp_path / "file.safetensors", base)
    save_tensors(theirs, tmp_path / "alone" / "file.safetensors")
    with pytest.raises(Refusal, match=r"image_encoder .config\.json, model\.safetensors. was looked for beside it\. Copy it"):
        given(of, tmp_path / "alone" / "file.safetensors", base)
    recipe, weights = base
    with pytest.raises(Refusal, match="this backbone is a DiT"):
        given(
            of, of.home / "models" / "linear.safetensors", (recipe | {"backbone": {"_target_": "ldm.backbone.dit.DiT"}}, weights)
        )
