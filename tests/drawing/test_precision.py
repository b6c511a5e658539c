"""Drawing in half precision: the network alone, whose matrices are kept in the bits that its file has."""

from functools import partial

import pytest
import torch
from torch import nn

from helpers.blocks import NETWORKS
from helpers.family import loud
from ldm.backbone.unet import UNet
from ldm.drawing.precision import Half, hold, in_precision
from ldm.files.weights import weights_hash
from ldm.types import Cond, Widths

UNETS = {"unet": partial(UNet, width=16, mult=(1, 2), res_blocks=1, depth=(1, 1), heads=2, groups=4)}
BITS = {
    "16": (torch.float16, 2e-3),
    "bf16": (torch.bfloat16, 2e-2),
}  # and how far from float32


def test_a_second_time_reaches_the_network_and_float32_comes_back():
    """As sampler=flow_map asks: (x_t, t, to)."""
    seen = []

    def guidance(model, ask):
        def denoise(x_t, t, *to):
            seen.append((to, torch.is_autocast_enabled("cpu")))
            return x_t.bfloat16()

        return denoise

    denoise = in_precision(guidance, "bf16", torch.device("cpu"))(None, {})
    assert denoise(torch.ones(1), torch.tensor(1.0)).dtype == torch.float32
    denoise(torch.ones(1), torch.tensor(1.0), torch.tensor(0.0))
    assert seen == [((), True), ((torch.tensor(0.0),), True)]
    assert in_precision(guidance, "32", torch.device("cpu")) is guidance


def network(name, kind):
    """A small network, all of whose numbers are of 16 bits, and what it is asked."""
    torch.manual_seed(3)
    vector = 256 + 16 if name in ("flux", "mmdit") else 32
    net = loud({**NETWORKS, **UNETS}[name](channels=4, widths=Widths(tokens=24, vector=vector))).eval().requires_grad_(False)
    net.load_state_dict({n: x.to(kind).float() for n, x in net.state_dict().items()})
    x, tokens, told = (torch.randn(2, *size) for size in ((4, 8, 8), (5, 24), (vector,)))
    return net, (x, torch.tensor([3.0, 700.0]), Cond(tokens=tokens, vector=told))


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("name", [*NETWORKS, *UNETS])
def test_a_network_is_kept_in_the_bits_of_its_file_and_says_what_autocast_says(name, precision):
    """To the bit, at half the memory, whoever calls it; and within a bound of what float32 says."""
    kind, bound = BITS[precision]
    net, asked = network(name, kind)
    exact, before = net(*asked), weights_hash(net)
    with torch.autocast("cpu", kind):
        wanted = net(*asked)
    matrices = [x for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d) for x in layer.parameters()]
    hold(net, {"precision": precision}, precision)
    assert {x.dtype for x in matrices} == {kind} and weights_hash(net) == before
    assert {x.dtype for x in net.parameters()} - {kind} <= {torch.float32}, "norms and tables"
    assert torch.equal(net(*asked), wanted), "also where no autocast is on, as in an inversion"
    with torch.autocast("cpu", kind):
        assert torch.equal(net(*asked), wanted)
    assert 0 < (wanted.float() - exact).square().mean().sqrt() < bound * exact.std(), "docs/interop.md has it"
    hold(net, {"precision": precision}, "32")
    assert torch.equal(net(*asked), exact) and {x.dtype for x in net.parameters()} == {torch.float32}


def test_what_16_bits_do_not_hold_stays_as_it_is():
    """A matrix that an adapter has changed; a model of float32, in whatever precision it is drawn; another kind of 16 bits."""
    net, asked = network("unet", torch.float16)
    changed = net.middle[1].proj_in.weight
    changed += 1e-4 * torch.randn_like(changed)
    before = changed.clone()
    hold(net, {"precision": "16"}, "bf16")
    assert changed.dtype == torch.float32 and torch.equal(changed, before)
    assert net.middle[1].proj_out.weight.dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        found = net(*asked)
    hold(net, {"precision": "16"}, "32")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(*asked), found), "drawn in bfloat16, float16's numbers are rounded as float32's are"
    hold(net, {}, "16")
    assert {x.dtype for x in net.parameters()} == {torch.float32} and not isinstance(vars(net).get("forward"), Half)
