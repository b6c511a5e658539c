"""Transformers' gradients: on one process, or shared out over ranks and computed again, block by block."""

from functools import partial

import torch
from torch import nn

from helpers.family import loud
from ldm.backbone.dit import DiT
from ldm.backbone.flux import Flux
from ldm.backbone.mmdit import MMDiT
from ldm.training.callback.compile import blocks_of
from ldm.training.callback.recompute import Recompute
from ldm.training.parallel.sharded import shard, whole
from ldm.types import Cond, Widths

SMALL = {"width": 32, "heads": 2}
NETWORKS = {
    "dit": partial(DiT, size=8, depth=2, rotary=True, norm_heads=True, shared=True, registers=1, **SMALL),
    "dit joint": partial(DiT, size=8, depth=2, tokens="joint", **SMALL),
    "mmdit": partial(MMDiT, size=8, most=8, depth=3, again=1, norm_heads=True, **SMALL),
    "flux": partial(Flux, depth=2, single=2, axes=(4, 6, 6), guided=True, **SMALL),
}


def gradients(rank=0, mesh=None):
    """-> by network and name, of a loss over four latents; on a mesh of two ranks each has two of them."""
    found = {}
    for name, made in NETWORKS.items():
        torch.manual_seed(3)
        vector = 32 if name.startswith("dit") else 256 + 16
        net = loud(made(channels=4, widths=Widths(tokens=24, vector=vector))).double()
        x, tokens, told = (torch.randn(4, *size).double() for size in ((4, 8, 6), (5, 24), (vector,)))
        mask, t = torch.arange(5) < torch.tensor([[5], [2], [3], [5]]), torch.tensor([3.0, 700.0, 20.0, 500.0]).double()
        part = slice(None)
        if mesh is not None:
            part = slice(2 * rank, 2 * rank + 2)
            shard([net], mesh)
            Recompute(["net"]).on_fit_start(None, nn.ModuleDict({"net": net}))
            assert len(blocks_of(net)) == len(net.blocks) > 1 and all("forward" in vars(block) for block in net.blocks)
        out = net(x[part], t[part], Cond(tokens=tokens[part], vector=told[part], mask=mask[part]))
        out.square().mean().backward()
        found |= {f"{name} {n}": whole(p.grad, rank == 0) for n, p in net.named_parameters() if p.grad is not None}
    return found
