"""What transformers' files and folders hold that is not read, by name; and what computes again instead of keeping."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.modern import ours_of, their_flux, their_mmdit
from ldm.backbone.dit import DiT
from ldm.build import build
from ldm.files.folder import save_tensors, write_json
from ldm.interop.begin import begin, check_unseen
from ldm.interop.bundle import Bundle, Part, recipe_of
from ldm.interop.convert import check, read
from ldm.interop.network import flux, mmdit
from ldm.interop.network._stream_names import check_told
from ldm.interop.tie import give
from ldm.types import Cond, Widths


def test_a_flux_in_fp8_or_nf4_is_named_and_what_makes_it_whole(tmp_path):
    """Before any shape is asked for: 4-bit weights lie packed in bytes."""
    theirs = single(guided=False)
    packed = {n: x.flatten()[: x.numel() // 2, None].to(torch.uint8) if x.ndim == 2 else x for n, x in theirs.items()}
    for kind, weights in (("float8_e4m3fn", {n: x.to(torch.float8_e4m3fn) for n, x in theirs.items()}), ("uint8", packed)):
        save_tensors(weights, tmp_path / f"{kind}.safetensors")
        with pytest.raises(ValueError, match=rf"is {kind}, quantised numbers\. Take the float32, bfloat16 .* dequantize\(\)"):
            read(str(tmp_path / f"{kind}.safetensors"))


def bundle_of(peer, network):
    net = ours_of(peer)
    settings, _, _ = network.read_config({"_class_name": type(peer).__name__, **peer.config})
    weights = {f"denoiser.backbone.{n}": x for n, x in net.state_dict().items()}
    return Bundle(recipe_of(network.node(settings), {}, "Flow", {"_target_": "ldm.schedule.Linear"}), weights)


def test_an_autoencoder_of_other_channels_is_refused():
    bundle = bundle_of(their_mmdit(in_channels=16, out_channels=16), mmdit.NETWORK)
    bundle.parts["autoencoder"] = Part({"_target_": "ldm.autoencoder.kl.KL", "channels": 4}, {"mean": torch.zeros(4)})
    with pytest.raises(ValueError, match="draws latents of 16 channels; its autoencoder's have 4"):
        check(bundle, "it", None)


def single(guided=True):
    """A small Flux in the published layout."""
    net = ours_of(their_flux(guided))
    return give(flux.NETWORK.single_ties(net.state_dict(), {"depth": 2}, "Flow"), net.state_dict())


def wider(theirs):
    """With a patch of 2 more channels to read, as Flux Fill's are."""
    return theirs | {"img_in.weight": torch.zeros(32, 24)}


def comfy(theirs):
    return {f"model.diffusion_model.{name}": x for name, x in theirs.items()}


FILES = {
    "fill": (wider, r"The Flux takes 2 channels beside the 4 noisy ones, as Fill"),
    "comfy": (lambda x: comfy(x) | {"vae.conv.weight": torch.zeros(2)}, r"holds a Flux and more, such as vae\.conv"),
    "piece": (lambda x: {"context_embedder.bias": x["img_in.bias"]}, "or one of several pieces, .* name that folder"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_flux_alone_is_named(kind, tmp_path):
    edit, words = FILES[kind]
    save_tensors(edit(single()), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=words):
        read(str(tmp_path / "x.safetensors"))


def test_a_flux_behind_another_programs_prefix_is_the_same(tmp_path):
    save_tensors(comfy(single()), tmp_path / "x.safetensors")
    bundle, layout = read(str(tmp_path / "x.safetensors"))
    assert layout == "flux" and torch.equal(bundle.weights["denoiser.backbone.embed.weight"], single()["img_in.weight"])


def test_gguf_and_a_quantised_folder_are_named_and_what_makes_them_whole(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is GGUF, quantised numbers\. .* GGUF diffusers makes it"):
        read(str(tmp_path / "x.gguf"))
    config = {"_class_name": "FluxTransformer2DModel", "quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(ValueError, match=r"transformer is quantised .*bitsandbytes.*dequantize\(\)"):
        flux.NETWORK.read_config(config)


def test_a_pipeline_of_another_network_names_it(tmp_path):
    index = {"_class_name": "Flux2Pipeline", "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "X"]}
    write_json(index, tmp_path / "model_index.json")
    write_json({"_class_name": "Flux2Transformer2DModel"}, tmp_path / "transformer" / "config.json")
    with pytest.raises(ValueError, match=r"is a Flux2Pipeline on a Flux2Transformer2DModel; .*SD3Transformer2DModel.* are known"):
        read(str(tmp_path))


def test_what_published_models_are_not_told_is_not_lost():
    """A class beside the text has no place in their pipelines, and a guidance scale only where it is learnt."""
    label, number = ({"_target_": f"ldm.condition.{kind}"} for kind in ("label.Label", "number.Number"))
    told = Bundle({"condition": {"text": {"_target_": "ldm.condition.text.Text"}, "guidance": number}})
    check_told(told, "Number")
    for strange in (told, Bundle({"condition": {"kind": label}})):
        with pytest.raises(ValueError, match=r"told by text; this one has condition\.(kind|guidance)\. Use --to ldm"):
            check_told(strange)


def dit_recipe(**settings):
    return {"backbone": {"_target_": "ldm.backbone.dit.DiT", "width": 32, "heads": 2, **settings}}


@pytest.mark.parametrize("name, value", [("heads", 4), ("rotary", True), ("tokens", "joint")])
def test_attention_of_another_kind_is_no_beginning_though_no_tensor_shows_it(name, value):
    with pytest.raises(ValueError, match=rf"is another network: its backbone\.{name} is .*, and {value} here"):
        check_unseen(dit_recipe(**{name: value}), dit_recipe(), "it")
    check_unseen(dit_recipe(size=64, learn_range=True), dit_recipe(), "it")


def test_positions_for_another_size_stay():
    """PixArt's stage of 512 pixels begins from that of 256."""
    here, there = (nn.ModuleDict({"backbone": DiT(4, Widths(), size=size, width=32, depth=1, heads=2)}) for size in (16, 8))
    place = here["backbone"].position.clone()
    assert "stays  backbone.position: 64 places, 16 there" in begin(here, there.state_dict(), "it")
    assert torch.equal(here["backbone"].position, place)
    assert torch.equal(here["backbone"].embed.weight, there["backbone"].embed.weight)


@pytest.mark.parametrize("settings, words", [({"patch": 4}, "embed.weight"), ({"fixed": False}, r"fixed positions there alone")])
def test_a_dit_of_another_patch_or_position_kind_is_no_beginning(settings, words):
    sizes = {"size": 8, "width": 32, "depth": 1, "heads": 2, "rotary": True}
    here, there = (nn.ModuleDict({"backbone": DiT(4, Widths(), **{**sizes, **told})}) for told in (settings, {}))
    with pytest.raises(ValueError, match=words):
        begin(here, there.state_dict(), "it")


@pytest.mark.parametrize("peer, vector", [(their_mmdit, 20), (lambda: their_flux(True), 276)])
def test_blocks_computed_again_say_the_same(peer, vector):
    """As callback=[recompute] wraps each: the same output and gradients to the bit."""
    net = ours_of(peer())
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2) * 1000, Cond(tokens=torch.randn(2, 5, 24), vector=torch.randn(2, vector))
    found = []
    for wrap in (lambda forward: forward, lambda forward: partial(checkpoint, forward, use_reentrant=False)):
        for block in net.blocks:
            block.forward = wrap(block.forward)
        net.zero_grad()
        out = net(x, t, cond)
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("name", ["mmdit", "flux", "dit"])
def test_a_recipe_of_a_network_builds_it_again(name):
    """By its node alone, as a model at rest is."""
    peer = {"mmdit": their_mmdit, "flux": their_flux}.get(name)
    node = {
        "_target_": "ldm.backbone.dit.DiT",
        "_partial_": True,
        "size": 8,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "tokens": "joint",
    }
    node = node if peer is None else bundle_of(peer(), {"mmdit": mmdit, "flux": flux}[name].NETWORK).recipe["backbone"]
    net = build(node)(channels=4, widths=Widths(tokens=24, vector=20 if peer else 0))
    assert len(net.blocks) == node["depth"] + node.get("single", 0)
