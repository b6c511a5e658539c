"""The published networks, ours and diffusers', around one set of random weights."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from ldm.backbone.dit import DiT
from ldm.backbone.unet import UNet
from ldm.interop.network import dit, unet
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
CASES = UNETS | DITS


def pair(name, part=1, device="cpu", dtype=torch.float32):
    """-> ours, diffusers', and of a batch size and a latent size the two calls' inputs; `part` divides all widths."""
    return (_unets if name in UNETS else _dits)(CASES[name], part, device, dtype)


def _unets(case, part, device, dtype):
    settings = UNET | case.settings
    settings["width"] //= part
    settings["groups"] = math.gcd(32, settings["width"])
    if settings["head_width"]:
        settings["head_width"] //= part
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
