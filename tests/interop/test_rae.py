"""diffusers' AutoencoderRAE and ours, the representation autoencoder: the same latents and pictures, both ways."""

import json
from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderRAE
from transformers import SiglipVisionModel

from ldm.autoencoder.rae import RAE
from ldm.build import load_autoencoder
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.interop.convert import describe, read, write
from ldm.nn.vit import ViT

ENCODERS = {"dinov2": (14, 28), "siglip2": (64, 128), "mae": (16, 32)}  # pixels a side of a patch, and of a picture
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=ENCODERS)
def stage(request, tmp_path_factory):
    """A kind, diffusers' autoencoder, and a folder with it and its translation into ours."""
    home, (patch, size) = tmp_path_factory.mktemp(request.param), ENCODERS[request.param]
    with pytest.MonkeyPatch.context() as patched:  # as diffusers calls SigLIP, which transformers 5 calls otherwise
        patched.setattr(SiglipVisionModel, "vision_model", property(lambda self: self), raising=False)
        torch.manual_seed(3)
        decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
        encoder = {
            "encoder_hidden_size": 64,
            "encoder_patch_size": patch,
            "encoder_num_hidden_layers": 2,
            "encoder_input_size": size,
        }
        statistics = {"latents_mean": torch.randn(64, 2, 2), "latents_std": torch.rand(64, 2, 2) + 0.5, "scaling_factor": 0.5}
        sizes = {"patch_size": 4, "decoder_intermediate_size": 48, "noise_tau": 0.3}
        peer = AutoencoderRAE(request.param, **encoder, **decoder, **sizes, **statistics).eval()
        for p in peer.parameters():
            torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
        peer.save_pretrained(home / "theirs")
        write(read(str(home / "theirs"))[0], home / "ours", "ldm")
    return request.param, peer, home


def test_latents_and_pictures_are_diffusers(stage):
    """In float64; statistics are kept in float32, and DINOv2's positions are laid out in it."""
    kind, peer, home = stage
    ours, peer = load_autoencoder(str(home / "ours")).double(), deepcopy(peer).double()
    pictures, latents = torch.rand(2, 3, 8, 8).double(), torch.randn(2, 64, 2, 2).double()
    exact = {"atol": 1e-9, "rtol": 1e-9} if kind != "dinov2" else {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        told, theirs = ours.encode(pictures * 2 - 1), peer.encode(pictures).latent
        torch.testing.assert_close(ours.posterior(pictures * 2 - 1).mean, peer._denormalize_latents(theirs / 0.5), **exact)
        torch.testing.assert_close(told.mean, theirs, atol=1e-5, rtol=1e-5)
        drawn = peer.decode((peer._normalize_latents(latents)) * 0.5).sample
        torch.testing.assert_close((ours.reconstruct(latents) + 1) / 2, drawn, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close((ours.decode(latents) + 1) / 2, peer.decode(latents).sample, atol=1e-5, rtol=1e-5)
    assert not told.std.any() and (ours.channels, ours.factor) == (64, 4)


def test_its_folder_both_ways(stage):
    """Every tensor but those that say nothing of the features; diffusers reads what is written."""
    kind, peer, home = stage
    write(read(str(home / "ours"))[0], home / "again", "diffusers")
    before, after = (load_tensors(home / name / WEIGHTS) for name in ("theirs", "again"))
    assert before.keys() == after.keys()
    idle = [n for n in before if "mask_token" in n or n.startswith("encoder.head.")]
    scaled = ("_latents_std",)
    assert not [n for n, x in before.items() if n not in (*idle, *scaled) and not torch.equal(x, after[n])]
    torch.testing.assert_close(after["_latents_std"], before["_latents_std"] / 0.5 + 1e-5, atol=1e-6, rtol=1e-5)
    if kind == "siglip2":
        return  # which diffusers cannot build beside transformers 5
    again, pictures = AutoencoderRAE.from_pretrained(home / "again"), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again.encode(pictures).latent, peer.encode(pictures).latent, atol=1e-5, rtol=1e-5)


def test_names_of_earlier_versions_are_read(stage, tmp_path):
    """As published folders, which transformers 4 wrote, name an encoder's layers."""
    kind, _, home = stage
    weights = {earlier(kind, name): x for name, x in load_tensors(home / "theirs" / WEIGHTS).items()}
    assert weights.keys() != load_tensors(home / "theirs" / WEIGHTS).keys()
    write_json(json.loads((home / "theirs" / "config.json").read_text()), tmp_path / "config.json")
    save_tensors({**weights, "decoder.decoder_pos_embed": torch.zeros(1, 5, 32)}, tmp_path / WEIGHTS)
    ours, again = load_autoencoder(str(home / "ours")).state_dict(), read(str(tmp_path))[0].parts["autoencoder"].weights
    assert ours.keys() == again.keys() and all(torch.equal(x, again[n]) for n, x in ours.items())


def earlier(kind, name):
    if not name.startswith("encoder."):
        return name
    if kind == "siglip2":
        return name.replace("encoder.", "encoder.vision_model.", 1)
    name = name.replace("encoder.layers.", "encoder.encoder.layer.")
    for letter, word in {"q": "query", "k": "key", "v": "value"}.items():
        name = name.replace(f"attention.{letter}_proj", f"attention.attention.{word}")
    name = name.replace("attention.o_proj", "attention.output.dense")
    return name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense") if kind == "mae" else name


def test_an_encoder_begins_with_the_published_weights(stage, tmp_path):
    """From a folder of transformers, or of an exported autoencoder; those of another network are refused."""
    _, peer, home = stage
    settings = json.loads((home / "ours" / "config.json").read_text())["encoder"]
    encoder = {name: value for name, value in settings.items() if name[0] != "_"}
    peer.encoder.config.save_pretrained(tmp_path)
    save_tensors({n: x.contiguous() for n, x in peer.encoder.state_dict().items()}, tmp_path / "model.safetensors")
    wanted = load_tensors(home / "ours" / "model.safetensors")
    for source in (tmp_path, home / "ours"):
        net = RAE(ViT(**encoder), weights=str(source), side=2, factor=4, width=32, depth=1, heads=2, inner=48)
        assert all(torch.equal(x, wanted[f"encoder.{name}"]) for name, x in net.encoder.state_dict().items())
        assert not any(p.requires_grad for p in net.encoder.parameters())
    with pytest.raises(Refusal, match=r"autoencoder\.encoder has tanh="):
        RAE(ViT(**{**encoder, "tanh": not encoder["tanh"]}), weights=str(tmp_path))
    with pytest.raises(Refusal, match=r"blocks\.1\..* None here|layers?\.1\..* is unknown"):
        RAE(ViT(**{**encoder, "depth": 1}), weights=str(tmp_path))


def test_what_there_is_no_place_for_is_refused(stage, tmp_path):
    _, _, home = stage
    bundle = read(str(home / "ours"))[0]
    assert "autoencoder" in describe(bundle)
    with pytest.raises(Refusal, match=r"has no place in a single file"):
        write(bundle, tmp_path / "rae.safetensors", "compvis")
    bundle.parts["autoencoder"].config["span"] = 2
    with pytest.raises(Refusal, match=r"autoencoder\.span=2"):
        write(bundle, tmp_path / "out", "diffusers")
    config = json.loads((home / "theirs" / "config.json").read_text())
    for wrong in (
        {"reshape_to_2d": False},
        {"encoder_type": "clip"},
        {"image_size": 9},
        {"encoder_input_size": 33},
        {"noise_tau": "a"},
        {"strange": 1},
    ):
        write_json({**config, **wrong}, tmp_path / "config.json")
        with pytest.raises(Refusal, match=next(iter(wrong))):
            read(str(tmp_path))
