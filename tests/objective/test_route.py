"""Patches that skip blocks, and masked training: where patches go, what is counted, and that left out it is nothing."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder.identity import Identity
from ldm.backbone.dit import DiT
from ldm.backbone.mlp import MLP
from ldm.conditioner import Conditioner
from ldm.denoiser import DataTime, Denoiser
from ldm.model import LatentModel
from ldm.nn.route import Route
from ldm.objective.align import Align
from ldm.objective.masked import Masked, seen_of
from ldm.objective.mean_flow import MeanFlow
from ldm.objective.regression import Regression
from ldm.objective.route import Routing, kept_of, routed
from ldm.objective.time import BySize, LogitNormal
from ldm.prediction import Flow
from ldm.schedule import Linear
from ldm.types import Cond, Draw, Widths

DRAW = Draw(0, torch.arange(4), 4)
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LEVEL = torch.tensor([0.1, 0.4, 0.6, 0.9])
KINDS = {
    "plain": {},
    "rotary": {"rotary": True, "fixed": False, "registers": 2, "rms_norm": True},
    "joint": {"tokens": "joint", "rotary": True},
    "cross": {"tokens": "cross", "shared": True},
}


def net(loud=True, **settings):
    torch.manual_seed(0)
    tokens = 6 if "tokens" in settings else 0
    made = DiT(3, Widths(tokens=tokens), **{"size": 8, "width": 16, "depth": 4, "heads": 2, **settings})
    for p in made.parameters() if loud else [made.last.out.weight]:
        nn.init.normal_(p, std=0.2)
    return made


def cond(settings):
    told = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
    return Cond(tokens=told, mask=torch.arange(5) < torch.tensor([[5], [3], [1], [4]])) if "tokens" in settings else Cond()


def model(backbone):
    return LatentModel(Identity(), Conditioner({}), Denoiser(backbone, Linear(), Flow(), DataTime())).train()


def heard(backbone, block, *call):
    seen = []
    handle = backbone.blocks[block].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    said = backbone(*call)
    handle.remove()
    return seen[0], said


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_patches_come_back_into_their_places(settings):
    """Those that went are what attention among them alone makes of them; those that waited are what they were, to the bit."""
    backbone, told = net(**settings), cond(settings)
    kept = kept_of(backbone, X, DRAW, 0.5)
    assert kept.shape == (4, 8) and len({tuple(row) for row in kept.tolist()}) > 1
    (h, each, turn, tokens, mask), _ = heard(backbone, 1, X, LEVEL, told)
    before = h.shape[1] - 16
    goes = torch.ones(4, h.shape[1], dtype=torch.bool)
    goes[:, before:] = torch.zeros(4, 16, dtype=torch.bool).scatter(1, kept, True)
    wanted = h
    for block in backbone.blocks[1:3]:
        if settings.get("tokens") == "cross":  # whose mask is of the tokens: one sample at a time
            rows = [
                block(wanted[i : i + 1, goes[i]], each[i : i + 1], turn, tokens[i : i + 1], mask[i : i + 1]) for i in range(4)
            ]
            full = wanted.clone()
            for i, row in enumerate(rows):
                full[i, goes[i]] = row[0]
        else:
            seen = goes[:, None, None] if mask is None else goes[:, None, None] & mask
            full = block(wanted, each, turn, tokens, seen)
        wanted = torch.where(goes[..., None], full, wanted)
    with routed(backbone, Route(2, 3, kept)):
        (came, *_), _ = heard(backbone, 3, X, LEVEL, told)
    torch.testing.assert_close(came, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(came[~goes], h[~goes]) and backbone.route is None
    same = net(loud=False, **settings)  # whose blocks are the identity
    with routed(same, Route(1, 4, kept)):
        assert torch.equal(same(X, LEVEL, told), net(loud=False, **settings)(X, LEVEL, told))


def test_joined_blocks_see_a_token_in_the_place_of_what_did_not_go():
    """SPRINT: out(cat(early, late)), with the token where a patch waited; it begins as the mean of the two."""
    backbone = net(fuse=[2, 3])
    kept = kept_of(backbone, X, DRAW, 0.75)
    (early, *_), _ = heard(backbone, 1, X, LEVEL, Cond())
    plain = net()
    plain.load_state_dict(backbone.state_dict(), strict=False)
    with routed(plain, Route(2, 3, kept)):
        (late, *_), _ = heard(plain, 3, X, LEVEL, Cond())
    goes = torch.zeros(4, 16, dtype=torch.bool).scatter(1, kept, True)
    late = torch.where(goes[..., None], late, backbone.fusion.token)
    with routed(backbone, Route(2, 3, kept)):
        (came, *_), _ = heard(backbone, 3, X, LEVEL, Cond())
    torch.testing.assert_close(came, backbone.fusion.out(torch.cat((early, late), 2)))
    fresh, plain = net(loud=False, fuse=[2, 3]), net(loud=False)
    plain.load_state_dict(fresh.state_dict(), strict=False)
    torch.testing.assert_close(fresh(X, LEVEL, Cond()), plain(X, LEVEL, Cond()))


@pytest.mark.parametrize("make", [partial(Routing, first=2, last=3), Masked], ids=["route", "masked"])
@pytest.mark.parametrize("fuse", [None, [2, 3]], ids=["tread", "sprint"])
def test_left_out_it_is_nothing_to_the_bit(make, fuse):
    """At rate 0, from step `until` on, and in validation."""
    if fuse and make is Masked:
        return
    wanted = Regression()(model(net(fuse=fuse)), {}, X, Cond(), DRAW)["loss"]
    late = Draw(0, DRAW.position, 4, step=5)
    for objective, draw in ((make(rate=0.0), DRAW), (make(until=5), late), (make().eval(), DRAW)):
        assert torch.equal(objective(model(net(fuse=fuse)), {}, X, Cond(), draw)["loss"], wanted)
    assert make(until=6)(model(net(fuse=fuse)), {}, X, Cond(), late)["loss"] != wanted


def flops(call):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("rate, kept", [(0.5, 8), (0.75, 4)])
@pytest.mark.parametrize("depth, first, last", [(6, 2, 5), (4, 1, 4)])
def test_flops_fall_by_exactly_what_is_left_out(rate, kept, depth, first, last):
    """A block of n patches and width C: 24 n C^2 in layers, 4 n^2 C in attention, and 12 C^2 a sample for its modulation."""
    backbone, width = net(depth=depth), 16

    def block(n):
        return 4 * (24 * n * width**2 + 4 * n * n * width + 12 * width**2)

    dense = flops(lambda: backbone(X, LEVEL, Cond()))
    with routed(backbone, Route(first, last, kept_of(backbone, X, DRAW, rate))):
        thin = flops(lambda: backbone(X, LEVEL, Cond()))
    assert dense - thin == (last - first + 1) * (block(16) - block(kept))


def test_masked_training_neither_sees_nor_judges_what_is_left_out():
    """Whatever lies there, the loss is the same; it is the mean of regression's over what is seen."""
    backbone, objective = net(), Masked(rate=0.5)
    kept = kept_of(backbone, X, DRAW, 0.5)
    seen = seen_of(kept, 2, X)
    assert seen.mean() == 0.5 and seen.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).unique().tolist() == [0, 1]
    losses = [objective(model(backbone), {}, x, Cond(), DRAW)["loss"] for x in (X, torch.where(seen > 0, X, 100.0))]
    assert torch.equal(*losses)
    t, noise = objective.time(DRAW.stratified("time"), Linear()), objective.noise(DRAW, X)
    with routed(backbone, Route(1, 4, kept)):
        output = model(backbone).denoiser.output((1 - t[:, None, None, None]) * X + t[:, None, None, None] * noise, t, Cond())
    error = (output - (noise - X)).square()[(seen > 0).expand_as(X)]
    torch.testing.assert_close(losses[0], error.mean(), rtol=1e-4, atol=0)


def test_masked_training_heeds_the_size_of_pictures():
    small, many = BySize(low=-1.0, high=3.0, few=16, many=64), LogitNormal(mean=-1.0)  # 16 patches here
    losses = [Masked(time=time)(model(net()), {}, X, Cond(), DRAW)["loss"] for time in (small, many)]
    assert torch.equal(*losses)


def test_a_copy_that_is_made_on_the_way_sees_all_patches():
    """Such as the average, which an objective asks for at its first step."""
    backbone = net()
    with routed(backbone, Route(2, 3, kept_of(backbone, X, DRAW, 0.5))):
        copied = deepcopy(backbone)
    assert torch.equal(copied(X, LEVEL, Cond()), backbone(X, LEVEL, Cond()))


def test_every_weight_of_joined_blocks_has_a_gradient_where_all_patches_go():
    """For which several processes wait."""
    backbone = net(fuse=[2, 3])
    backbone(X, LEVEL, Cond()).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters()) and not backbone.fusion.token.grad.any()


def test_derivatives_take_the_same_way():
    """MeanFlow's forward derivative goes through blocks that see fewer patches."""
    torch.manual_seed(0)
    backbone = DiT(3, Widths(vector=16), size=8, width=16, depth=4, heads=2)
    net = LatentModel(Identity(), Conditioner({}), Denoiser(backbone, Linear(), Flow(), DataTime(), span=16)).train()
    said = Routing(0.5, 2, 3, of=MeanFlow)(net, {}, X, Cond(), DRAW)
    said["loss"].backward()
    assert said["loss"].isfinite() and backbone.blocks[1].feed.wide.weight.grad is not None


class Teacher:
    def patches(self, images):
        return images.mean(1, keepdim=True)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"backbone=dit\); found MLP"):
        Routing()(model(MLP(3, Widths(), size=8, width=8)), {}, X, Cond(), DRAW)
    with pytest.raises(ValueError, match=r"objective\.first=3 objective\.last=-4: wanted two of its 4 blocks"):
        Routing()(model(net()), {}, X, Cond(), DRAW)
    with pytest.raises(ValueError, match=r"joins other blocks, backbone\.fuse=\[2, 3\]"):
        Routing(first=1, last=3)(model(net(fuse=[2, 3])), {}, X, Cond(), DRAW)
    for make in (Routing, Masked):
        with pytest.raises(ValueError, match=r"objective\.rate=1"):
            make(rate=1.0)
    with pytest.raises(ValueError, match=r"backbone\.fuse=\[3, 2\]"):
        net(fuse=[3, 2])
    batch = {"image": X}
    around = partial(Align, Teacher, width=16, hidden=8, of=partial(Routing, 0.75, 2, 3))
    with pytest.raises(ValueError, match="no feature a patch"):
        around(layer=2)(model(net()), batch, X, Cond(), DRAW)
    assert all(around(layer=layer)(model(net()), batch, X, Cond(), DRAW)["loss"].isfinite() for layer in (1, 4))


@pytest.mark.slow
def test_compiled_whole_it_is_compiled_once():
    """The way is another at every step, and no reason to compile anew."""
    counts, backbone, seen = [], net(), []
    backbone.compile(backend=lambda graph, inputs: counts.append(graph) or graph.forward, dynamic=False)
    for step in range(3):
        kept = kept_of(backbone, X, Draw(step, DRAW.position, 4), 0.5)
        with routed(backbone, Route(2, 3, kept)):
            said = backbone(X, LEVEL, Cond())
        with routed(other := net(), Route(2, 3, kept)):
            torch.testing.assert_close(said, other(X, LEVEL, Cond()))
        seen.append(len(counts))
    assert len(set(seen)) == 1
    torch._dynamo.reset()
