"""MMDiT and Flux against diffusers' networks with the same random weights, and what must not matter."""

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from helpers.modern import exactly, gradients_of, ours_of, their_flux, their_mmdit
from ldm.backbone.flux import Flux
from ldm.backbone.mmdit import MMDiT
from ldm.nn.sinusoid import sinusoid
from ldm.types import Cond, Widths

SD3 = {"medium": {}, "3.5 medium": {"again": (0, 1), "qk_norm": "rms_norm"}, "large": {"qk_norm": "rms_norm"}}
FLUX = {"schnell": False, "dev": True}
SIZES = [(8, 8), (6, 10)]


def said_by_mmdit(peer, x, t, cond):
    return peer(x, cond.tokens, cond.vector, t).sample


def said_by_flux(peer, x, t, cond):
    """As FluxPipeline packs, numbers and unpacks."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    packed = FluxPipeline._pack_latents(x, len(x), x.shape[1], *x.shape[2:])
    places = FluxPipeline._prepare_latent_image_ids(len(x), rows, columns, "cpu", torch.float32)
    guidance = torch.tensor([3.5, 7.0]).to(x) if peer.config.guidance_embeds else None
    told = {"img_ids": places, "txt_ids": torch.zeros(cond.tokens.shape[1], 3), "guidance": guidance}
    out = peer(packed, cond.tokens, cond.vector[:, :20], t / 1000, **told).sample
    return FluxPipeline._unpack_latents(out, x.shape[2] * 8, x.shape[3] * 8, 8)


def ask(peer, rows, columns, dtype):
    torch.manual_seed(2)
    x, tokens, vector = torch.randn(2, 4, rows, columns), torch.randn(2, 5, 24), torch.randn(2, 20)
    if peer.config.get("guidance_embeds"):
        vector = torch.cat((vector, sinusoid(torch.tensor([3500.0, 7000.0]), 256)), dim=1)
    return x.to(dtype), torch.tensor([3.0, 700.0]).to(dtype), Cond(tokens=tokens.to(dtype), vector=vector.to(dtype))


def compare(peer, said, rows, columns):
    """Output and every gradient, in float64."""
    net, given = ours_of(peer.double()), ask(peer, rows, columns, torch.float64)
    with exactly():
        theirs = said(peer, *given)
    ours = net(*given)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    theirs.square().sum().backward()
    ours.square().sum().backward()
    for name, wanted in gradients_of(peer).items():
        torch.testing.assert_close(net.get_parameter(name).grad, wanted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("kind", SD3)
def test_mmdit_against_diffusers(kind, rows, columns):
    compare(their_mmdit(**SD3[kind]), said_by_mmdit, rows, columns)


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("kind", FLUX)
def test_flux_against_diffusers(kind, rows, columns):
    compare(their_flux(FLUX[kind]), said_by_flux, rows, columns)


@pytest.mark.parametrize("kind", [*SD3, *FLUX])
def test_in_float32(kind):
    """As they are, with diffusers' own waves and turns."""
    peer, said = (their_mmdit(**SD3[kind]), said_by_mmdit) if kind in SD3 else (their_flux(FLUX[kind]), said_by_flux)
    given = ask(peer, 6, 10, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours_of(peer)(*given), said(peer, *given), atol=1e-4, rtol=1e-3)


SMALL = {"width": 32, "heads": 2}
FLUX_SIZES = {"depth": 2, "single": 2, "guided": True, "axes": (4, 6, 6), **SMALL}
NETS = {
    "mmdit": lambda **s: MMDiT(3, Widths(vector=20, tokens=10), **{"size": 8, "most": 8, "depth": 3, "again": 2, **SMALL, **s}),
    "flux": lambda **s: Flux(3, Widths(vector=276, tokens=10), **{**FLUX_SIZES, **s}),
}


@pytest.fixture(params=NETS)
def made(request):
    torch.manual_seed(0)
    return NETS[request.param]


def given(rows=8, columns=8, mask=None):
    torch.manual_seed(1)
    cond = Cond(vector=torch.randn(2, 276).double(), tokens=torch.randn(2, 5, 10).double(), mask=mask)
    return torch.randn(2, 3, rows, columns).double(), torch.tensor([3.0, 700.0]), cond


def told(net, x, t, cond):
    vector = cond.vector if isinstance(net, Flux) else cond.vector[:, :20]
    return net(x, t, Cond(vector=vector, tokens=cond.tokens, mask=cond.mask))


def loud(net):
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def test_they_start_as_the_identity_and_every_weight_learns(made):
    net, seen = made().double(), []
    for block in net.blocks:
        block.register_forward_hook(lambda _, into, out: seen.append(all(map(torch.equal, into[:2], out))))
    assert not told(net, *given()).any() and all(seen) and len(seen) == len(net.blocks)
    told(loud(net), *given()).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_masked_tokens_are_not_heard_and_no_sample_sees_another(made):
    net, mask = loud(made().double()), torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])
    x, t, cond = given(6, 10, mask)
    both = told(net, x, t, cond)
    for i in range(2):
        one = Cond(vector=cond.vector[[i]], tokens=cond.tokens[[i]][:, mask[i]])
        torch.testing.assert_close(both[[i]], told(net, x[[i]], t[[i]], one))


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("mmdit", {"heads": 3}, "width=32 must divide into heads=3"),
        ("flux", {"axes": (4, 4, 4)}, r"axes=\[4, 4, 4\], even numbers, add up"),
    ],
)
def test_what_they_cannot_be_is_said(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        NETS[kind](**settings)


def test_sizes_that_have_no_positions_and_conditions_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match=r"18x8; .* 16x16 at most \(backbone.patch, backbone.most"):
        told(NETS["mmdit"]().double(), *given(18, 8))
    with pytest.raises(ValueError, match="7x8, which patches of 2 do not divide"):
        told(NETS["flux"]().double(), *given(7, 8))
    with pytest.raises(ValueError, match=r"no condition brings any \(condition=\[text\]\)"):
        MMDiT(4, Widths(vector=8), **SMALL)
    with pytest.raises(ValueError, match="guidance is the last 256 numbers"):
        Flux(4, Widths(vector=20, tokens=8), guided=True, axes=(4, 6, 6), **SMALL)
