"""InstructPix2Pix: published weights draw as diffusers' pipeline does, with two guidances; there and back."""

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)

from helpers.family import loud, scheduler, their_pipeline, their_text, their_tokenizer, their_unet, their_vae
from ldm.autoencoder.identity import Identity
from ldm.build import build, load_model
from ldm.condition.edit import Edit
from ldm.conditioner import Conditioner
from ldm.embedder import Condition
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, read_json, write_json
from ldm.interop.__main__ import main
from ldm.interop.convert import read, write
from ldm.rest import recipe_of
from ldm.sampler.ddim import DDIM
from ldm.sampler.grid import Leading
from ldm.types import Cond, Draw, Widths

FIRST = "unet/diffusion_pytorch_model.safetensors", "conv_in.weight"
NOTHING = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module", params=["sd1", pytest.param("xl", marks=pytest.mark.slow)])
def made(request, tmp_path_factory):
    """-> diffusers' pipeline, its folder `theirs`, and ours of it in `ours`."""
    home = tmp_path_factory.mktemp("edit")
    if request.param == "xl":
        parts = their_pipeline("xl", home).components
        config = {k: v for k, v in parts["unet"].config.items() if k[0] != "_"}
        torch.manual_seed(1)
        unet = loud(UNet2DConditionModel.from_config(config | {"in_channels": 8}))
        parts = {name: part for name, part in parts.items() if name not in ("unet", "image_encoder", "feature_extractor")}
        pipeline = StableDiffusionXLInstructPix2PixPipeline(**parts, unet=unet)
    else:
        words = {"text_encoder": their_text(), "tokenizer": their_tokenizer(home / "w")}
        unet, vae = their_unet((True, False), 64, spatial=4), their_vae(scaling_factor=0.18215)
        pipeline = StableDiffusionInstructPix2PixPipeline(vae=vae, unet=unet, scheduler=scheduler(), **words, **NOTHING)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(home / "theirs")
    main([str(home / "theirs"), str(home / "ours"), "--to", "ldm"])
    return pipeline.to(torch.float64), home


def test_a_picture_is_changed_as_diffusers_changes_it(made):
    """Prompt, negative prompt and picture to picture, at (1.5, 7.5), in float64."""
    pipe, home = made
    g = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 16, 16, generator=g).double()
    noise = torch.randn(1, 4, 8, 8, generator=g).double()
    scales = {"image_guidance_scale": 1.5, "guidance_scale": 7.5}
    words = {"prompt": "make it autumn", "negative_prompt": "blurry", "num_inference_steps": 5, **scales}
    large = isinstance(pipe, StableDiffusionXLInstructPix2PixPipeline)
    words |= {"height": 16, "width": 16} if large else {}
    theirs = pipe(image=picture, latents=noise, output_type="pt", **words).images
    model = load_model(home / "ours").double()
    ask = {"caption": ["make it autumn"], "negative.caption": ["blurry"], "source": picture * 2 - 1}
    if large:
        sizes = {"original_height": 16, "original_width": 16, "crop_top": 0, "crop_left": 0, "target_height": 16}
        ask |= {field: torch.full((1,), size) for field, size in (sizes | {"target_width": 16}).items()}
    guidance = build(recipe_of(home / "ours").get("usual", {}).get("guidance") or USUAL)
    with torch.no_grad():
        latents = DDIM(5, grid=Leading(last=0.001))(guidance(model, ask), model.denoiser.schedule, noise, [3])
        ours = model.autoencoder.decode(latents).clamp(-1, 1)
    assert (ours.add(1) / 2 - theirs).abs().max() < 1e-4
    assert (theirs - picture).abs().max() > 0.1


USUAL = {"_target_": "ldm.guidance.scales.Scales", "scales": {"edit": 1.5, "text": 7.5}}


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_round_trips(made, layout):
    """To the bit, but for the four channels that take up the scale factor, which are so to rounding."""
    pipe, home = made
    if layout == "compvis" and isinstance(pipe, StableDiffusionXLInstructPix2PixPipeline):
        with pytest.raises(Refusal, match="an edit of Stable Diffusion XL is known in diffusers' layout alone"):
            write(read(str(home / "ours"))[0], home / "there.safetensors", "compvis", source="x")
        return
    target = home / ("there" if layout == "diffusers" else "there.safetensors")
    main([str(home / "ours"), str(target), "--to", layout])
    write(read(str(target))[0], home / f"again-{layout}", "ldm", source="x")
    one, other = (load_tensors(folder / "model.safetensors") for folder in (home / "ours", home / f"again-{layout}"))
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert one.keys() == other.keys() and set(changed) <= {"denoiser.backbone.encoder.0.0.weight"}
    for name in changed:
        assert torch.equal(one[name][:, :4], other[name][:, :4])
        torch.testing.assert_close(one[name], other[name], rtol=3e-7, atol=0)
    if layout == "diffusers":
        theirs, there = (load_tensors(folder / FIRST[0])[FIRST[1]] for folder in (home / "theirs", target))
        torch.testing.assert_close(theirs, there, rtol=3e-7, atol=0)
        assert DiffusionPipeline.from_pretrained(target).unet.config.in_channels == 8
        assert type(DiffusionPipeline.from_pretrained(target)) is type(pipe)
        index = read_json(target / "model_index.json")
        if "XL" in index["_class_name"]:
            write_json(index | {"is_cosxl_edit": True}, target / "model_index.json")
            with pytest.raises(Refusal, match="and not CosXL's"):
                read(str(target))


class Word(Condition):
    """Says 0 where it is dropped, else 1."""

    key, rate, widths = "caption", 0.1, Widths(vector=1)

    def forward(self, value, drop):
        return Cond(vector=(~drop).float()[:, None])


def test_both_are_dropped_by_one_number_as_published():
    """Text below 2 p, picture from p to 3 p of the same number (train_instruct_pix2pix.py, p = 0.05)."""
    conditioner = Conditioner({"text": Word(), "edit": Edit(Identity())})
    draw = Draw(0, torch.arange(4000), 4000)
    number, batch = draw.uniform("drop/text"), {"caption": ["a"] * 4000, "source": torch.ones(4000, 3, 1, 1)}
    cond = conditioner(batch, draw=draw)
    assert torch.equal(cond.vector[:, 0] == 0, number < 0.1)
    assert torch.equal(cond.spatial[:, 0, 0, 0] == 0, (number >= 0.05) & (number < 0.15))
    null = conditioner({"caption": ["a"], "source": torch.ones(1, 3, 1, 1)}, only=())
    assert not null.vector.any() and not null.spatial.any()
    with pytest.raises(Refusal, match=r"condition\.edit\.drop_from=0\.95: wanted 0 to 1 - rate"):
        Conditioner({"edit": Edit(Identity(), drop_from=0.95)})
