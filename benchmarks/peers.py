"""The published networks, ours and diffusers', around one set of random weights."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiTTransformer2DModel, FluxPipeline, UNet2DConditionModel

from ldm.backbone.dit import DiT
from ldm.backbone.unet import UNet
from ldm.interop.bundle import BACKBONE, Bundle, filled
from ldm.interop.network import dit, flux, mmdit, pixart, unet
from ldm.interop.network._unet_config import unet_config
from ldm.interop.tie import give
from ldm.nn.empty import weightless
from ldm.types import Cond, Widths

UNET = {
    "width": 320,
    "mult": (1, 2, 4, 4),
    "res_blocks": 2,
    "depth": (1, 1, 1, 0),
    "middle_depth": 1,
    "heads": 8,
    "head_width": None,
    "groups": 32,
    "tokens_only": (),
}
SDXL = {"mult": (1, 2, 4), "depth": (0, 2, 10), "middle_depth": 10, "head_width": 64}


@dataclass(frozen=True)
class Case:
    """A published network; `size` is its own latent height and width."""

    widths: Widths
    size: int
    settings: dict[str, Any] = field(default_factory=dict)


UNETS = {
    "SD1.5": Case(Widths(tokens=768), 64),
    "SD2": Case(Widths(tokens=1024), 64, {"head_width": 64}),
    "SDXL": Case(Widths(tokens=2048, vector=2816), 128, SDXL),
}
DITS = {"DiT-XL/2": Case(Widths(vector=1152), 32, {"width": 1152, "depth": 28, "heads": 16, "learn_range": True})}
# At their published widths, with 4 of their blocks, of Flux 1 + 2, so that both fit into a machine's memory.
STREAMS = {
    "SD3": Case(Widths(tokens=4096, vector=2048), 128, {"depth": 4}),
    "SD3.5": Case(Widths(tokens=4096, vector=2048), 128, {"depth": 4, "again": 3, "norm_heads": True}),
    "Flux": Case(Widths(tokens=4096, vector=768), 128, {"depth": 1, "single": 2}),
    "PixArt": Case(Widths(tokens=4096), 64, {"size": 64, "depth": 4, "shared": True}),
}
CASES = UNETS | DITS | STREAMS


def pair(name, part=1, device="cpu", dtype=torch.float32):
    """-> ours, diffusers', and of a batch size and a latent size the two calls' inputs; `part` divides all widths."""
    if name in STREAMS:
        return _streams(name, part, device, dtype)
    return (_unets if name in UNETS else _dits)(CASES[name], part, device, dtype)


def unet_settings(case, part):
    """-> those of a U-Net whose widths are divided by `part`."""
    settings = UNET | case.settings
    settings["width"] //= part
    settings["groups"] = math.gcd(32, settings["width"])
    if settings["head_width"]:
        settings["head_width"] //= part
    return settings


def _unets(case, part, device, dtype):
    settings = unet_settings(case, part)
    with weightless():
        net = UNet(4, case.widths, **settings)
    weights = randomised(net, device, dtype)
    config = unet_config(settings, weights, {"number": {}})
    with weightless():
        peer = UNet2DConditionModel.from_config(config)
    peer.load_state_dict(give(unet.diffusers(weights, settings), weights), assign=True)

    def inputs(batch, size):
        x, level = torch.randn(batch, 4, size, size), torch.randint(1000, (batch,)).float()
        x, level, tokens = x.to(device, dtype), level.to(device), torch.randn(batch, 77, case.widths.tokens).to(device, dtype)
        if not case.widths.vector:
            return (x, level, Cond(tokens=tokens)), (x, level, tokens), {}
        pooled, sizes = torch.randn(batch, 1280).to(device, dtype), torch.randint(1024, (batch, 6), device=device)
        waves = peer.add_time_proj(sizes.flatten()).unflatten(0, (batch, 6)).flatten(1).to(x)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        return (x, level, Cond(tokens=tokens, vector=torch.cat((pooled, waves), 1))), (x, level, tokens), added

    return net.to(device), peer.to(device), inputs


def _dits(case, part, device, dtype):
    """diffusers keeps the embedding of noise level and class in every block; its waves are set to the published code's."""
    settings = {**case.settings, "width": case.settings["width"] // part}
    width, depth, heads = (settings[name] for name in ("width", "depth", "heads"))
    with weightless():
        net = DiT(4, Widths(vector=width), **settings)
        peer = DiTTransformer2DModel(
            heads, width // heads, 4, 8, depth, sample_size=32, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=32
        )
    own, table = randomised(net, device, dtype), torch.randn(1001, width).to(device, dtype)
    theirs = give(dit.diffusers(own, depth), own) | give(dit.diffusers_table(depth), {"table": table})
    peer.load_state_dict(theirs, assign=True)
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0

    def inputs(batch, size):
        x, level = torch.randn(batch, 4, size, size).to(device, dtype), torch.randint(1000, (batch,), device=device)
        label = torch.randint(1000, (batch,), device=device)
        return (x, level, Cond(vector=table[label])), (x, level, label), {}

    return net.to(device, dtype), peer.to(device, dtype), inputs


def _streams(name, part, device, dtype):
    """MMDiT, Flux and PixArt; `part` divides the heads."""
    network = {"SD3": mmdit, "Flu": flux, "Pix": pixart}[name[:3]].NETWORK
    channels, case = 4 if network is pixart.NETWORK else 16, CASES[name]
    settings = filled(network.made, case.settings)
    settings |= {
        "heads": settings["heads"] // part,
        "width": settings["width"] // settings["heads"] * (settings["heads"] // part),
    }
    with weightless():
        net = network.made(channels, case.widths, **settings)
    own = randomised(net, device, dtype)
    own |= {n: x.to(device, dtype) for n, x in net.named_buffers()}
    bundle = Bundle({"backbone": network.node(settings)}, {f"{BACKBONE}{n}": x for n, x in own.items()})
    with weightless():
        peer = getattr(diffusers, network.classes[0]).from_config(network.config(network.settings(bundle), bundle))
    peer.load_state_dict(give(network.diffusers_ties(own, settings), own), assign=True)
    peer = Packed(peer) if network is flux.NETWORK else peer

    def inputs(batch, size):
        x, level = torch.randn(batch, channels, size, size).to(device, dtype), torch.rand(batch, device=device) * 1000
        tokens = torch.randn(batch, 154 if channels == 16 else 120, case.widths.tokens).to(device, dtype)
        if not case.widths.vector:
            return (x, level, Cond(tokens=tokens)), (x, tokens, level), {}
        vector = torch.randn(batch, case.widths.vector).to(device, dtype)
        return (x, level, Cond(tokens=tokens, vector=vector)), (x, tokens, vector, level), {}

    return net.to(device, dtype), peer.to(device, dtype), inputs


class Packed(torch.nn.Module):
    """diffusers' Flux, whose pipeline packs latents and numbers their places."""

    def __init__(self, peer):
        super().__init__()
        self.peer = peer

    def forward(self, x, tokens, vector, level):
        """(B, C, H, W) and what it is told -> .sample (B, C, H, W)."""
        place = FluxPipeline._prepare_latent_image_ids(len(x), x.shape[2] // 2, x.shape[3] // 2, x.device, torch.float32)
        told = {"img_ids": place, "txt_ids": torch.zeros(tokens.shape[1], 3, device=x.device)}
        out = self.peer(FluxPipeline._pack_latents(x, *x.shape), tokens, vector, level / 1000, **told).sample
        return SimpleNamespace(sample=FluxPipeline._unpack_latents(out, x.shape[2] * 8, x.shape[3] * 8, 8))


def randomised(net, device, dtype):
    """Puts random weights in place under which all branches are heard and nothing grows; -> them by name."""
    weights = {}
    for name, p in net.named_parameters():
        x = torch.empty(p.shape, device=device, dtype=dtype)
        if p.ndim > 1:
            weights[name] = x.uniform_(-1, 1).mul_((3 / p[0].numel()) ** 0.5)
        else:
            weights[name] = x.fill_(float(name.endswith("weight")))
    net.load_state_dict(weights, strict=False, assign=True)
    return weights
