"""A DiT that reads tokens, at any size: against diffusers' PixArt, and what must not matter."""

import pytest
import torch
from torch import nn
from torch.nn.functional import pixel_unshuffle, silu

from helpers.modern import exactly, gradients_of, ours_of, their_pixart
from ldm.backbone.dit import DiT
from ldm.nn.sinusoid import sinusoid
from ldm.types import Cond, Widths

MODERN = {"rms_norm": True, "swiglu": True, "rotary": True, "norm_heads": True, "fixed": False, "registers": 3}
KINDS = {"cross": {}, "joint": {"tokens": "joint"}, "shared": {"shared": True}}
KINDS |= {f"modern {kind}": {**settings, **MODERN} for kind, settings in KINDS.items()}
KINDS["head"] = {"rotary": True, "registers": 2, "head": [48, 1, 3]}


def small(settings, loud=True):
    torch.manual_seed(0)
    net = DiT(3, Widths(vector=32, tokens=10), **{"size": 8, "width": 32, "depth": 2, "heads": 2, **settings}).double()
    for p in net.parameters() if loud else ():
        nn.init.normal_(p, std=0.2)
    return net


def ask(rows=8, columns=8, length=5, mask=None):
    torch.manual_seed(1)
    x, tokens = torch.randn(2, 3, rows, columns).double(), torch.randn(2, length, 10).double()
    return x, torch.tensor([3.0, 700.0]), Cond(vector=torch.randn(2, 32).double(), tokens=tokens, mask=mask)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("rows, columns", [(4, 4), (8, 8), (6, 10)])
def test_pixart_against_diffusers(rows, columns):
    """Any size and aspect, with masked tokens; each weight's gradient too."""
    peer = their_pixart().double()
    net = ours_of(peer)
    x, t, tokens = torch.randn(2, 4, rows, columns).double(), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24).double()
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    with exactly():
        theirs = peer(x, tokens, t, encoder_attention_mask=mask.long()).sample[:, :4]
    ours = net(x, t, Cond(tokens=tokens, mask=mask))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    theirs.square().sum().backward()
    ours.square().sum().backward()
    for name, wanted in gradients_of(peer).items():
        torch.testing.assert_close(net.get_parameter(name).grad, wanted, atol=1e-8, rtol=1e-8)


def test_pixart_in_float32():
    """As it is, with diffusers' own waves."""
    peer = their_pixart()
    x, t, tokens = torch.randn(2, 4, 6, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24)
    with torch.no_grad():
        theirs, ours = peer(x, tokens, t).sample[:, :4], ours_of(peer)(x, t, Cond(tokens=tokens))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_it_starts_as_the_identity_and_every_weight_learns(kind):
    """Each block leaves the patches as they are, whatever the tokens say."""
    net, seen = small(kind, loud=False), []
    for block in net.blocks:
        block.register_forward_hook(lambda _, given, made: seen.append(torch.equal(given[0], made)))
    assert not net(*ask()).any() and seen == [True] * len(net.blocks)
    for _ in range(5 if "head" in kind else 3):  # from its start on, as in training: no branch stays silent behind another
        (net(*ask()) - ask()[0]).square().sum().backward()
        with torch.no_grad():
            silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
            [p.sub_(0.01 * p.grad.sign()) for p in net.parameters() if p.grad is not None]
            net.zero_grad()
    assert not silent
    net = small(kind)
    net(*ask()).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_tokens_are_heard_in_any_order_and_masked_ones_are_not(kind):
    net, mask = small(kind), torch.tensor([[True, True, True, False, False]] * 2)
    x, t, cond = ask(mask=mask)
    short = net(x, t, Cond(vector=cond.vector, tokens=cond.tokens[:, :3]))
    torch.testing.assert_close(net(x, t, cond), short)
    shuffled = Cond(vector=cond.vector, tokens=cond.tokens[:, [1, 2, 0]])
    torch.testing.assert_close(net(x, t, shuffled), short)
    assert (net(x, t, Cond(vector=cond.vector, tokens=cond.tokens)) - short).abs().max() > 1e-3


def test_a_sample_does_not_see_its_batch_at_any_size(kind):
    net = small(kind)
    for rows, columns in ((8, 8), (4, 12), (16, 2)):
        x, t, cond = ask(rows, columns, mask=torch.tensor([[True] * 5, [True, False, True, True, False]]))
        one = Cond(vector=cond.vector[1:], tokens=cond.tokens[1:], mask=cond.mask[1:])
        both = net(x, t, cond)
        assert both.shape == (2, 3, rows, columns)
        torch.testing.assert_close(both[1:], net(x[1:], t[1:], one))


def test_a_head_reads_the_latents_anew_and_the_blocks_say_how():
    """DiT^DH (2510.11690, section 5), its own block the identity: norm(E x) (1 + scale) + shift, both of silu(J silu(t + h))."""
    net, heard = small({"head": [48, 1, 3], "rotary": True}), []
    for p in net.blocks[2].modulate.parameters():
        nn.init.zeros_(p)
    net.blocks[1].register_forward_hook(lambda *call: heard.append(call[-1]))
    x, t, cond = ask()
    out, (h,) = net(x, t, cond), heard
    time = net.level(sinusoid(t, 256).double())
    shift, scale = net.last.modulate(silu(net.head.join(silu(time[:, None] + h)))).chunk(2, dim=2)
    read = net.last.norm(net.head.embed(x).flatten(2).transpose(1, 2))
    wanted = net.last.out(read * (1 + scale) + shift).transpose(1, 2)
    torch.testing.assert_close(
        pixel_unshuffle(out, 2).unflatten(1, (3, 4)).flatten(3), wanted.unflatten(1, (4, 3)).transpose(1, 2)
    )


def test_rotary_positions_alone_tell_distances_and_no_places():
    """In a row of patches of equal content, none can tell which one it is; but which lies beside which is heard."""
    net = small({**MODERN, "registers": 0})
    x, t, cond = ask(2, 16)
    same = x[:, :, :, :2].repeat(1, 1, 1, 8)
    out = net(same, t, cond)
    assert all(torch.allclose(out[..., :2], out[..., 2 * i : 2 * i + 2]) for i in range(8))
    fixed = small({**MODERN, "registers": 0, "fixed": True})(same, t, cond)
    assert not torch.allclose(fixed[..., :2], fixed[..., 2:4])
    assert not torch.allclose(net(x, t, cond).roll(2, 3), net(x.roll(2, 3), t, cond), atol=1e-4)


def test_a_rectangle_of_as_many_patches_has_positions_of_its_own():
    """Which were the square's before, row after row."""
    net = small({})
    x, t, cond = ask(4, 16)
    square = net(x.reshape(2, 3, 4, 2, 8).transpose(2, 3).reshape(2, 3, 8, 8), t, cond)
    assert not torch.allclose(net(x, t, cond).flatten(), square.flatten())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fixed": False}, "backbone.rotary=true"),
        ({"tokens": "both"}, "backbone.tokens=both: cross or joint"),
        ({"size": 7}, "into patches of 2"),
        ({"head": [48, 2, 5]}, r"backbone.head=\[48, 2, 5\]: wanted its width, blocks and heads"),
    ],
)
def test_what_it_cannot_be_is_said(settings, words):
    with pytest.raises(ValueError, match=words):
        small(settings)


def test_latents_that_no_patches_fill_are_refused():
    with pytest.raises(ValueError, match=r"7x8, which patches of 2 do not divide \(backbone.patch"):
        small({})(*ask(7, 8))
