"""Autoencoders without 1x1 convolutions around their latents, with a shift: Stable Diffusion 3's and Flux's, in both layouts."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from helpers.family import loud
from ldm.build import load_autoencoder
from ldm.files.folder import load_tensors
from ldm.interop.convert import read, write
from ldm.interop.statistics import folded, scale_of

PUBLISHED = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}


@pytest.fixture(scope="module", params=PUBLISHED)
def stage(request, tmp_path_factory):
    """diffusers' autoencoder, and a folder with it and its translation into ours."""
    home, (scale, shift) = tmp_path_factory.mktemp(request.param), PUBLISHED[request.param]
    torch.manual_seed(6)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    said = {"scaling_factor": scale, "shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False}
    peer = loud(AutoencoderKL(block_out_channels=[32, 64], latent_channels=16, layers_per_block=1, **kinds, **said))
    peer.save_pretrained(home / "theirs")
    write(read(str(home / "theirs"))[0], home / "ours", "ldm")
    return request.param, peer.double(), home


def test_latents_are_the_pipelines(stage):
    """(z - shift) scale, as every pipeline of theirs reckons."""
    name, peer, home = stage
    scale, shift = PUBLISHED[name]
    ours, pictures = load_autoencoder(str(home / "ours")).double(), torch.rand(2, 3, 16, 24).double() * 2 - 1
    assert (ours.channels, ours.factor) == (16, 2)
    with torch.no_grad():
        told, theirs = ours.encode(pictures), peer.encode(pictures).latent_dist
        torch.testing.assert_close(told.mean, (theirs.mean - shift) * scale, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(told.std, theirs.std * scale, atol=1e-6, rtol=1e-6)
        latents = torch.randn(2, 16, 4, 6).double()
        torch.testing.assert_close(ours.decode(latents), peer.decode(latents / scale + shift).sample, atol=1e-5, rtol=1e-5)


def test_both_layouts_both_ways(stage):
    """Every tensor and setting; the names of the single file are those that diffusers reads."""
    name, _, home = stage
    theirs = load_tensors(home / "theirs" / "diffusion_pytorch_model.safetensors")
    write(read(str(home / "ours"))[0], home / "again", "diffusers")
    again = load_tensors(home / "again" / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == again.keys() and all(torch.equal(x, again[n]) for n, x in theirs.items())
    config = json.loads((home / "again" / "config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"]) == PUBLISHED[name]
    AutoencoderKL.from_pretrained(home / "again")
    write(read(str(home / "ours"))[0], home / "ae.safetensors", "compvis")
    single = load_tensors(home / "ae.safetensors")
    assert "encoder.mid.attn_1.q.weight" in single and not [n for n in single if "quant_conv" in n]
    converted = convert_ldm_vae_checkpoint(dict(single), config)
    assert converted.keys() == theirs.keys() and all(
        torch.equal(x.reshape(theirs[n].shape), theirs[n]) for n, x in converted.items()
    )
    bundle = read(str(home / "ae.safetensors"))[0]
    assert scale_of(bundle.parts["autoencoder"]) == PUBLISHED["flux"]
    assert bundle.assumed[1:] == ["shift: 0.1159 (Stable Diffusion 3 has 0.0609)"] and "0.3611" in bundle.assumed[0]


def test_statistics_by_channel_fold_into_convolutions_of_their_own(stage):
    """As measured statistics are: other layouts have one scale and one shift, and get the two convolutions that take them up."""
    _, _, home = stage
    bundle = read(str(home / "ours"))[0]
    part = bundle.parts["autoencoder"]
    part.weights = {**part.weights, "mean": torch.randn(16), "std": torch.rand(16) + 0.5}
    write(bundle, home / "measured", "ldm")
    write(bundle, home / "folded", "diffusers")
    assert scale_of(part) is None and folded(part)["quant_conv.weight"].shape == (32, 32, 1, 1)
    ours, peer = load_autoencoder(str(home / "measured")), AutoencoderKL.from_pretrained(home / "folded")
    with torch.no_grad():
        latents = torch.randn(1, 16, 4, 4)
        assert peer.config.scaling_factor == 1.0
        torch.testing.assert_close(peer.decode(latents).sample, ours.decode(latents), atol=1e-3, rtol=1e-3)


def test_one_convolution_of_the_two_is_refused(stage):
    _, _, home = stage
    path = home / "theirs" / "config.json"
    told = path.read_text()
    path.write_text(json.dumps(json.loads(told) | {"use_post_quant_conv": True}))
    with pytest.raises(ValueError, match="use_quant_conv=False and use_post_quant_conv=True"):
        read(str(home / "theirs"))
    path.write_text(told)
