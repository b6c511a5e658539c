"""Small random transformers as diffusers builds them, and ours with their weights."""

from contextlib import contextmanager
from unittest import mock

import diffusers
import torch
from torch.nn.functional import rms_norm

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
def exactly():
    """diffusers' networks without the float32 that they turn to on their way: norms of heads, rotary turns, and waves of numbers.

    Those are ours here: their frequencies differ in the last bits, and are multiplied by 1,000.
    """
    place = "diffusers.models"
    with (
        mock.patch(f"{place}.embeddings.get_timestep_embedding", lambda t, width, **_: sinusoid(t, width)),
        mock.patch(f"{place}.normalization.RMSNorm.forward", lambda self, x: rms_norm(x, self.dim, self.weight, self.eps)),
        mock.patch(f"{place}.transformers.transformer_flux.apply_rotary_emb", turn_in_double),
    ):
        yield


def turn_in_double(x, turn, sequence_dim):
    cos, sin = (part[None, :, None].to(x) for part in turn)
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-right, left), dim=-1).flatten(3) * sin


def gradients_of(peer):
    """diffusers' gradients, by our names and in our shapes."""
    network = next(n for n in networks() if type(peer).__name__ in n.classes)
    settings, channels, widths = network.read_config({"_class_name": type(peer).__name__, **peer.config})
    shapes = network.shapes(channels, widths, settings)
    ties = {n: tie for n, tie in network.diffusers_ties(shapes, settings).items() if n != "position"}
    return bring(ties, {n: p.grad for n, p in peer.named_parameters()}, shapes)


def their_mmdit(again=(), **settings):
    """SD3Transformer2DModel of 3 blocks, whose positions are a square of 6 x 6 laid over 4 x 4 patches."""
    torch.manual_seed(12)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32, "num_layers": 3, "in_channels": 4}
    told = {"joint_attention_dim": 24, "pooled_projection_dim": 20, "sample_size": 8, "pos_embed_max_size": 6, "out_channels": 4}
    return loud(diffusers.SD3Transformer2DModel(**{**sizes, **told, "dual_attention_layers": tuple(again), **settings}))


def their_flux(guided=False, **settings):
    """FluxTransformer2DModel of 2 blocks of each kind."""
    torch.manual_seed(13)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2, "in_channels": 16}
    told = {"joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6), "guidance_embeds": guided}
    return loud(diffusers.FluxTransformer2DModel(**{**sizes, **told, **settings}))
