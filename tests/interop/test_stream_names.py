"""The names of MMDiT's, Flux' and PixArt's tensors: there and back in both layouts, and as diffusers' converters have them."""

import inspect
import textwrap

import pytest
import torch
from diffusers.loaders import single_file_utils

from helpers.modern import ours_of, their_flux, their_mmdit, their_pixart
from ldm.interop.find import networks, recognised
from ldm.interop.tie import bring, give

MODELS = {
    "medium": lambda: their_mmdit(attention_head_dim=64, caption_projection_dim=128),
    "3.5 medium": lambda: their_mmdit((0, 1), qk_norm="rms_norm", attention_head_dim=64, caption_projection_dim=128),
    "schnell": their_flux,
    "dev": lambda: their_flux(True),
    "pixart": lambda: their_pixart(attention_head_dim=64, cross_attention_dim=128, interpolation_scale=1),
}
CONVERTED = {
    "MMDiT": "convert_sd3_transformer_checkpoint_to_diffusers",
    "Flux": "convert_flux_transformer_checkpoint_to_diffusers",
}


@pytest.fixture(params=MODELS)
def model(request):
    peer = MODELS[request.param]()
    return peer, next(n for n in networks() if type(peer).__name__ in n.classes), ours_of(peer)


def test_there_and_back(model):
    """Bitwise in both layouts; a single file is recognised, and tells how its network is built."""
    peer, network, net = model
    built = settings, channels, widths = network.read_config({"_class_name": type(peer).__name__, **peer.config})
    weights, shapes = net.state_dict(), network.shapes(channels, widths, settings)
    theirs = give(network.diffusers_ties(shapes, settings), weights)
    assert theirs.keys() == peer.state_dict().keys() and all(torch.equal(x, peer.state_dict()[n]) for n, x in theirs.items())
    ties = network.single_ties(shapes, settings, "Flow")
    single = give(ties, weights, network.prefix)
    assert recognised(single) is network
    again = bring(ties, single, shapes, network.prefix)
    assert again.keys() == weights.keys() - network.computed(settings).keys()
    assert all(torch.equal(x, weights[n]) for n, x in again.items())
    found = network.settings_of({n.removeprefix(network.prefix): tuple(x.shape) for n, x in single.items()}, {})
    unsaid = {"size"} if "size" in settings else {"axes"}
    assert {n: v for n, v in found[0].items() if n not in unsaid} == {n: v for n, v in settings.items() if n not in unsaid}
    assert found[1:] == built[1:]


def test_single_files_are_those_that_diffusers_reads(model):
    peer, network, net = model
    if network.name not in CONVERTED:
        return
    settings = network.read_config({"_class_name": type(peer).__name__, **peer.config})[0]
    single = give(network.single_ties(net.state_dict(), settings, "Flow"), net.state_dict(), network.prefix)
    convert = getattr(single_file_utils, CONVERTED[network.name])
    if network.name == "Flux":  # where the published width stands in the code
        convert = rewritten(convert, "inner_dim = 3072", f"inner_dim = {settings['width']}")
    converted = convert(dict(single))
    assert converted.keys() == peer.state_dict().keys()
    assert all(torch.equal(x, peer.state_dict()[n]) for n, x in converted.items())


def rewritten(function, before, after):
    """A function of diffusers with another constant in it."""
    text = textwrap.dedent(inspect.getsource(function))
    assert before in text
    space = dict(vars(single_file_utils))
    exec(text.replace(before, after), space)
    return space[function.__name__]


FLUX_DEV = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "guidance_embeds": True}
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("SD3Transformer2DModel", {"dual_attention_layers": [1], "caption_projection_dim": 32}, "dual_attention_layers"),
        ("SD3Transformer2DModel", {"qk_norm": "layer_norm"}, "qk_norm=layer_norm"),
        ("SD3Transformer2DModel", {"caption_projection_dim": 7}, "caption_projection_dim=7"),
        ("FluxTransformer2DModel", {"patch_size": 2, "guidance_embeds": False}, "patch_size=2"),
        (
            "PixArtTransformer2DModel",
            {"use_additional_conditions": True, "caption_channels": 8, "cross_attention_dim": 32},
            "use_additional_conditions",
        ),
        ("PixArtTransformer2DModel", {"use_additional_conditions": False, "cross_attention_dim": 32}, "caption_channels"),
    ],
)
def test_settings_that_are_not_built_are_named(kind, settings, words):
    network = next(n for n in networks() if kind in n.classes)
    with pytest.raises(ValueError, match=words):
        network.read_config({"_class_name": kind, **SIZES, **settings})


def test_configs_that_are_silent_mean_what_their_classes_mean():
    """As those of Flux dev (axes_dims_rope) and of Stable Diffusion 3 medium (dual_attention_layers, qk_norm) are."""
    sizes = {"num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 24, "caption_projection_dim": 1536}
    for kind, settings in (("SD3Transformer2DModel", sizes), ("FluxTransformer2DModel", FLUX_DEV)):
        network = next(n for n in networks() if kind in n.classes)
        found, channels, widths = network.read_config({"_class_name": kind, **settings})
        assert (found["depth"], channels, widths["tokens"]) == (settings["num_layers"], 16, 4096)
