"""Small random transformers as diffusers builds them, and ours with their weights."""

from contextlib import contextmanager
from unittest import mock

import diffusers
import torch

from helpers.family import loud
from ldm.interop.find import networks
from ldm.interop.tie import bring
from ldm.nn.sinusoid import sinusoid
from ldm.types import Widths


def their_pixart(**settings):
    """PixArtTransformer2DModel, whose positions are laid over 2 x 2 patches."""
    torch.manual_seed(11)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    told = {"cross_attention_dim": 32, "caption_channels": 24, "sample_size": 8, "interpolation_scale": 2}
    return loud(diffusers.PixArtTransformer2DModel(**{**sizes, **told, "use_additional_conditions": False, **settings}))


def ours_of(peer):
    """Our network with the weights of diffusers', in its precision."""
    network = next(n for n in networks() if type(peer).__name__ in n.classes)
    settings, channels, widths = network.read_config({"_class_name": type(peer).__name__, **peer.config})
    shapes = network.shapes(channels, widths, settings)
    weights = bring(network.diffusers_ties(shapes, settings), peer.state_dict(), shapes) | network.computed(settings)
    with torch.device("meta"):
        net = network.made(channels, Widths(**widths), **settings)
    net.load_state_dict(weights, assign=True)
    return net.to(peer.dtype)


@contextmanager
def same_waves():
    """diffusers' waves of a number, rounded as ours: float32 frequencies differ in their last bits, and are multiplied by 1,000."""
    with mock.patch("diffusers.models.embeddings.get_timestep_embedding", lambda t, width, **_: sinusoid(t, width)):
        yield


def gradients_of(peer):
    """diffusers' gradients, by our names and in our shapes."""
    network = next(n for n in networks() if type(peer).__name__ in n.classes)
    settings, channels, widths = network.read_config({"_class_name": type(peer).__name__, **peer.config})
    shapes = network.shapes(channels, widths, settings)
    return bring(network.diffusers_ties(shapes, settings), {n: p.grad for n, p in peer.named_parameters()}, shapes)
