"""The vocabulary: draws that never change, conditions that join, moments that sample."""

import math

import pytest
import torch

from ldm.types import Cond, Draw, Moments, Widths, like

UNIFORM, NORMAL = [0.5102225, 0.4870519, 0.6932737], [0.401999, -0.429127, 0.02152]


def test_draws_stay_what_they_were():
    """A run that is resumed under a later version goes on with the same numbers."""
    draw = Draw(1, torch.tensor([0, 1, 10**12]), 4)
    torch.testing.assert_close(draw.uniform("time"), torch.tensor(UNIFORM), atol=1e-6, rtol=0)
    torch.testing.assert_close(draw.normal("noise", (1,))[:, 0], torch.tensor(NORMAL), atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", [1, 3, 16])
def test_a_sample_draws_the_same_in_any_company(split):
    position = torch.randperm(16) + 5_000_000_000
    whole, parts = Draw(9, position, 16), [Draw(9, p, 16) for p in position.split(split)]
    for draw in (lambda d: d.normal("a", (2, 2)), lambda d: d.uniform("a", (3,)), lambda d: d.stratified("a")):
        assert torch.equal(draw(whole), torch.cat([draw(p) for p in parts]))


def test_moments_of_the_draws():
    draw = Draw(2, torch.arange(20_000), 1)
    u, x = draw.uniform("u").double(), draw.normal("x", (2,)).double()
    assert u.min() >= 0 and u.max() < 1
    for k in (1, 2, 3, 4):
        spread = math.sqrt((1 / (2 * k + 1) - 1 / (k + 1) ** 2) / len(u))
        assert (u**k).mean().item() == pytest.approx(1 / (k + 1), abs=5 * spread)
    for k, wanted, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (x**k).mean().item() == pytest.approx(wanted, abs=5 * math.sqrt(variance / x.numel()))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_stratified_times_fill_every_interval_once(batch):
    for start in (0, 3 * batch):
        u = Draw(0, torch.arange(start, start + batch), batch).stratified("time").double()
        assert sorted((u * batch).floor().long().tolist()) == list(range(batch)) and 0 <= u.min() and u.max() < 1


def test_moments_sample():
    mean, std, noise = torch.randn(3, 2, 4, 5, 5)
    assert torch.equal(Moments(mean, torch.zeros_like(std)).sample(noise), mean)
    torch.testing.assert_close(Moments(mean, std).sample(noise), mean + std * noise)


def test_like_lays_a_scale_over_a_batch():
    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(like(torch.tensor([1.0, 2.0, 3.0]), x) * x, torch.stack([x[0], 2 * x[1], 3 * x[2]]))
    assert torch.equal(like(torch.tensor(2.0), x) * x, 2 * x)


def some(masked, grow=1):
    """Conditions of every kind, with or without masks; the i-th is wider by i * grow."""
    for i, has_mask in enumerate(masked):
        n = i * grow
        mask = torch.rand(2, 3 + n) > 0.5 if has_mask else None
        yield Cond(torch.randn(2, 4 + n), torch.randn(2, 3 + n, 5), mask, torch.randn(2, 1 + n, 2, 2))


def same(a, b):
    slots = [(getattr(a, name), getattr(b, name)) for name in ("vector", "tokens", "mask", "spatial")]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in slots)


@pytest.mark.parametrize("masked", [(0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 0)])
def test_joining_is_associative_with_silence_as_its_unit(masked):
    a, b, c = some(masked)
    assert same((a + b) + c, a + (b + c)) and same(a + Cond(), a) and same(Cond() + a, a)
    widths = [Widths(x.vector.shape[1], x.tokens.shape[2], x.spatial.shape[1]) for x in (a, b, c)]
    whole = a + b + c
    assert sum(widths, Widths()) == Widths(whole.vector.shape[1], whole.tokens.shape[2], whole.spatial.shape[1])
    shown = [x.mask if x.mask is not None else torch.ones(x.tokens.shape[:2], dtype=torch.bool) for x in (a, b, c)]
    assert whole.mask is None if not any(masked) else torch.equal(whole.mask, torch.cat(shown, 1))


@pytest.mark.parametrize("masked", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_a_stack_is_both_halves(masked):
    a, b = some(masked, grow=0)
    both = a.stack(b)
    for name in ("vector", "tokens", "spatial"):
        assert torch.equal(getattr(both, name), torch.cat((getattr(a, name), getattr(b, name))))
    shown = [x.mask if x.mask is not None else torch.ones(2, 3, dtype=torch.bool) for x in (a, b)]
    assert both.mask is None if not any(masked) else torch.equal(both.mask, torch.cat(shown))


TOKENS = torch.ones(2, 3, 5)
UNLIKE = {
    "length": Cond(tokens=torch.ones(2, 4, 5)),
    "width": Cond(tokens=torch.ones(2, 3, 6)),
    "nothing": Cond(),
    "vector": Cond(tokens=TOKENS, vector=torch.ones(2, 1)),
    "map": Cond(tokens=TOKENS, spatial=torch.ones(2, 1, 4, 4)),
}


@pytest.mark.parametrize("other", UNLIKE.values(), ids=UNLIKE)
def test_what_is_not_alike_is_not_stacked(other):
    for a, b in ((Cond(tokens=TOKENS), other), (other, Cond(tokens=TOKENS))):
        with pytest.raises(ValueError, match=r"shapes .* cannot share a batch"):
            a.stack(b)


def test_tokens_of_two_widths_are_refused():
    with pytest.raises(ValueError, match=r"widths, 8 and 16.*condition\.<name>\.width"):
        Widths(tokens=8) + Widths(vector=1) + Widths(tokens=16)
