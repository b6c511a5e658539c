"""Every network is one graph to torch.compile, compiled once: no break, no second time for other numbers of the same shapes."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from helpers.clip import CLIP
from helpers.survive import against
from helpers.training import contrast, diffusion
from ldm.adapter.controlnet import Control, Controlled
from ldm.autoencoder.kl import KL
from ldm.autoencoder.vq import VQ
from ldm.backbone.dit import DiT
from ldm.backbone.flux import Flux
from ldm.backbone.mmdit import MMDiT
from ldm.backbone.unet import UNet
from ldm.build import build
from ldm.compose import CONFIGS
from ldm.training.callback.bfloat16 import keep_bfloat16
from ldm.training.callback.compile import Compile
from ldm.training.callback.recompute import Recompute
from ldm.training.stage.contrast import Contrast
from ldm.types import Cond, Draw, Widths

TOKENS, VECTOR = 12, 20
FEW = {"width": 32, "mult": (1, 2), "res_blocks": 1, "depth": (0, 1), "groups": 8}
SMALL = {"width": 32, "heads": 2}


def unet(spatial=0, **settings):
    return UNet(4, Widths(tokens=TOKENS, vector=VECTOR, spatial=spatial), **FEW, heads=2, **settings)


def controlled():
    """Behind the base's four channels come a hint's features and strength."""
    net = Controlled(unet())
    net.nets["edges"] = Control(net.base)
    return net.eval()


TOLD = Widths(tokens=TOKENS, vector=VECTOR)
NETWORKS = {
    "unet": unet,
    "controlnet": controlled,
    "pixart": lambda: DiT(4, Widths(tokens=TOKENS), size=8, depth=2, shared=True, learn_range=True, **SMALL),
    "lightningdit": lambda: DiT(4, TOLD, size=8, depth=2, rotary=True, swiglu=True, vector=nn.Linear, tokens="joint", **SMALL),
    "mmdit": lambda: MMDiT(4, TOLD, size=8, most=8, depth=2, again=1, norm_heads=True, **SMALL),
    "flux": lambda: Flux(4, TOLD, depth=1, single=1, axes=(4, 6, 6), **SMALL),
}

PLAIN = ("pixart", "mmdit")  # whose graphs are found quickly


def ask(channels=4, batch=2, size=8, seed=0):
    """Some tokens are masked, on the processor as on a device."""
    torch.manual_seed(seed)
    cond = Cond(torch.randn(batch, VECTOR), torch.randn(batch, 5, TOKENS), torch.arange(5) < torch.tensor([[5], [3]]))
    return torch.randn(batch, channels, size, size), 1000 * torch.rand(batch), cond


def loud(network):
    for p in network.parameters():
        nn.init.normal_(p, std=0.05)
    return network


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing of another test is compiled already."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def is_one_graph(run, *asks):
    """Raises where a graph breaks or is compiled a second time; -> whether the same comes out."""
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=False)
    for i, given in enumerate(asks):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(*given), run(*given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in PLAIN else pytest.mark.slow) for n in NETWORKS])
def test_a_network_is_one_graph(name):
    channels = 4 + 33 if name == "controlnet" else 4
    is_one_graph(loud(NETWORKS[name]()), ask(channels), ask(channels, seed=1))


@pytest.mark.parametrize("made", [KL, pytest.param(partial(VQ, codes=8), marks=pytest.mark.slow)], ids=["kl", "vq"])
def test_an_autoencoder_is_one_graph_each_way(made):
    net = loud(made(channels=4, width=8, mult=(1, 2), res_blocks=1, groups=4)).eval()
    is_one_graph(net.encoder, *((torch.rand(2, 3, 16, 16),) for _ in range(2)))
    is_one_graph(net.decode, *((torch.randn(2, 4, 8, 8),) for _ in range(2)))


@pytest.mark.slow
def test_bfloat16_and_recomputing_break_nothing():
    """What callbacks put in the place of norms' and blocks' forward."""
    net = loud(unet())
    keep_bfloat16(net)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(*ask()), net(*ask()), atol=0.05, rtol=0.05)
    net = loud(NETWORKS["mmdit"]())
    Recompute(["net"]).on_fit_start(None, nn.ModuleDict({"net": net}))
    is_one_graph(net, ask(), ask(seed=1))


class Counts:
    """A backend that counts what it is given, and runs it."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_no_block_is_left_out_where_blocks_are_compiled_one_by_one():
    """torch keeps 8 variants of a function, and blocks of one class are one: the others would run as if never compiled."""
    blocks, seen = nn.ModuleList(nn.Linear(4, 4 + i) for i in range(12)), Counts()
    callback = Compile(["blocks"], backend=seen)
    callback.settings["fullgraph"] = True  # which refuses what it would leave out
    with torch._dynamo.config.patch(recompile_limit=8):
        callback.on_fit_start(type("Trainer", (), {"accumulate_grad_batches": 1}), nn.ModuleDict({"blocks": blocks}))
        for _ in range(2):
            assert [block(torch.randn(2, 4)).shape[1] for block in blocks] == list(range(4, 16))
    assert seen.graphs == 12


# ---- all configs, and the parts that stages name


def shrunken(name):
    """configs/backbone/NAME with few, narrow blocks of each of its kinds -> the network and what it is asked."""
    node, at = {}, name
    while at is not None:  # the config that it varies
        own = OmegaConf.to_container(OmegaConf.load(CONFIGS / "backbone" / f"{at}.yaml"))
        at = (own.pop("defaults", None) or [None])[0]
        node = own | node
    narrow = {
        "mult": [1, 2] if "mult" in node else None,
        "res_blocks": 1,
        "middle_depth": 1,
        "groups": 8,
        "head_width": 8 if node.get("head_width") else None,
        "size": 8,
        "most": 8,
        "single": 1,
        "axes": [4, 6, 6],
        "again": min(node.get("again", 0), 1),
        "tokens_only": [i for i in node.get("tokens_only", []) if i < 2],
    }
    node |= {key: value for key, value in narrow.items() if key in node}
    node |= {"width": 32} | ({"heads": 2} if "heads" in node else {})
    node["depth"] = [0, 1] if isinstance(node.get("depth"), list) else 2
    spoken = not name.endswith("unconditional")
    identity = "identity" in str(node.get("vector"))
    vector = (128 if "unet" in name else 32) if identity else 256 + VECTOR if node.get("guided") else VECTOR
    torch.manual_seed(0)
    net = loud(build(node)(channels=4, widths=Widths(tokens=TOKENS * spoken, vector=vector * spoken)))

    def asked(seed):
        x, level, cond = ask(seed=seed)
        cond = Cond(torch.randn(2, vector), cond.tokens, cond.mask) if spoken else Cond()
        return x, level, cond

    return net, asked


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "backbone").glob("*.yaml")))
def test_every_backbone_of_the_configs_is_one_graph(name):
    net, asked = shrunken(name)
    is_one_graph(net, asked(0), asked(1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [diffusion, against, lambda: contrast(CLIP)], ids=["diffusion", "autoencoding", "contrast"])
def test_what_a_stage_compiles_has_no_break_forward_and_backward(stage):
    stage = stage().train(False)
    batch = {"position": torch.arange(2), "label": torch.tensor([1, 2]), "caption": ["a", "b c"]}
    batch["image"] = torch.rand(2, 3, *((32, 32) if isinstance(stage, Contrast) else (8, 8)))
    plain = stage.losses(batch, Draw(0, batch["position"], 2))["loss"]
    callback = Compile(backend="aot_eager")
    callback.settings["fullgraph"] = True
    callback.on_fit_start(type("Trainer", (), {"accumulate_grad_batches": 1}), stage)
    found = stage.losses(batch, Draw(0, batch["position"], 2))["loss"]
    found.backward()
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
