"""What transformers' files and folders hold that is not read, by name; and what computes again instead of keeping."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.modern import ours_of, their_flux, their_mmdit
from ldm.backbone.dit import DiT
from ldm.build import build
from ldm.files.folder import save_tensors
from ldm.interop.begin import begin
from ldm.interop.bundle import Bundle, Part, recipe_of
from ldm.interop.convert import check, read
from ldm.interop.network import flux, mmdit
from ldm.interop.tie import give
from ldm.types import Cond, Widths


def test_a_flux_in_fp8_or_nf4_is_named_and_what_makes_it_whole(tmp_path):
    """Before any shape is asked for: 4-bit weights lie packed in bytes."""
    net = ours_of(their_flux())
    theirs = give(flux.NETWORK.single_ties(net.state_dict(), {"depth": 2}, "Flow"), net.state_dict())
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
    bundle.parts["autoencoder"] = Part({"_target_": "ldm.autoencoder.kl.KL", "channels": 4}, {})
    with pytest.raises(ValueError, match="draws latents of 16 channels; its autoencoder's have 4"):
        check(bundle, "it", None)


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
