"""Guidance on a whole model, told by two conditions of which one is never dropped."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.autoencoder.identity import Identity
from ldm.backbone.unet import UNet
from ldm.build import build
from ldm.command.usual import as_usual
from ldm.compose import CONFIGS, compose_config
from ldm.condition.label import Label
from ldm.conditioner import Conditioner
from ldm.denoiser import Denoiser, LogRatio
from ldm.guidance.autoguidance import Autoguidance
from ldm.guidance.cfg import CFG
from ldm.guidance.interval import Interval
from ldm.guidance.none import Unguided
from ldm.guidance.scales import Scales
from ldm.model import LatentModel
from ldm.prediction import Flow
from ldm.schedule import Cosine, Linear
from ldm.types import Cond

ASK = {"kind": torch.tensor([1, 2]), "size": torch.tensor([0, 3])}


@pytest.fixture
def model():
    return model_of({"kind": Label(4, 8, key="kind", rate=0.1), "size": Label(4, 8, key="size", rate=0.0)})


def three_conditions():
    return model_of({n: Label(4, 8, key=n, rate=0.1) for n in ("a", "b", "c")})


def model_of(embedders):
    conditioner = Conditioner(embedders)
    net = UNet(3, conditioner.widths, width=8, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return LatentModel(Identity(), conditioner, Denoiser(net, Linear(), Flow(), LogRatio())).eval()


X, T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(0.6)


@torch.no_grad()
def test_one_is_unguided_to_the_bit_and_zero_is_the_null(model):
    cond, null = (model.denoiser(X, T, c) for c in (model.condition(ASK), model.condition(ASK, only=())))
    assert torch.equal(CFG(1.0)(model, ASK)(X, T), cond) and torch.equal(Unguided()(model, ASK)(X, T), cond)
    torch.testing.assert_close(CFG(0.0)(model, ASK)(X, T), null, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(CFG(2.5)(model, ASK)(X, T), null + 2.5 * (cond - null), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(cond, null, atol=1e-3)


@torch.no_grad()
def test_the_null_keeps_what_is_never_dropped(model):
    other = ASK | {"size": torch.tensor([1, 1])}
    assert not torch.allclose(CFG(0.0)(model, ASK)(X, T), CFG(0.0)(model, other)(X, T), atol=1e-4)
    other = ASK | {"kind": torch.tensor([3, 3])}
    torch.testing.assert_close(CFG(0.0)(model, ASK)(X, T), CFG(0.0)(model, other)(X, T))


@torch.no_grad()
def test_a_negative_like_the_request_is_no_guidance(model):
    ask = ASK | {"negative.kind": ASK["kind"]}
    torch.testing.assert_close(CFG(4.0)(model, ask)(X, T), Unguided()(model, ASK)(X, T), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_negative_takes_the_place_of_its_own_condition_alone():
    """The others are dropped in the null as without it; a scale for each condition knows negatives too."""
    model = three_conditions()
    ask = {n: torch.tensor([1, 2]) for n in "abc"}
    asked = ask | {"negative.b": torch.tensor([3, 3])}
    null = model.condition(ask | {"b": torch.tensor([3, 3])}, only=["b"])
    x_cond, x_null = model.denoiser(X, T, model.condition(ask)), model.denoiser(X, T, null)
    torch.testing.assert_close(CFG(2.5)(model, asked)(X, T), x_null + 2.5 * (x_cond - x_null), atol=1e-4, rtol=1e-3)
    same = Scales({"a": 2.5, "b": 2.5, "c": 2.5})(model, asked)(X, T)
    torch.testing.assert_close(same, CFG(2.5)(model, asked)(X, T), atol=1e-3, rtol=1e-3)
    for unheard in (CFG(1.0), Scales({"a": 1.0, "b": 1.0}), Interval(inner=CFG(1.0))):
        with pytest.warns(UserWarning, match=r"negative request changes nothing at guidance\.scale"):
            unheard(model, asked)
    assert torch.equal(Interval(low=1e9)(model, asked)(X, T), Unguided()(model, ask)(X, T))


@torch.no_grad()
def test_two_conditions_of_one_field_each_hear_the_negative_where_they_are_not_told():
    """As two text models that read one caption: telling one leaves the negative to the other."""
    model = model_of({n: Label(4, 8, key="caption", rate=0.1) for n in "ab"})
    ask, no = {"caption": torch.tensor([1, 2])}, torch.tensor([3, 3])

    def x_hat(a, b):
        tokens = [model.conditioner.embedders[n].table(c)[:, None] for n, c in (("a", a), ("b", b))]
        return model.denoiser(X, T, Cond(tokens=torch.cat(tokens, dim=1)))

    asked, yes = ask | {"negative.caption": no}, ask["caption"]
    x_0, x_1, x_2 = x_hat(no, no), x_hat(yes, no), x_hat(yes, yes)
    torch.testing.assert_close(Scales({"a": 2.0, "b": 3.0})(model, asked)(X, T), x_0 + 2 * (x_1 - x_0) + 3 * (x_2 - x_1))
    torch.testing.assert_close(Scales({"b": 3.0})(model, asked)(X, T), x_1 + 3 * (x_2 - x_1))
    torch.testing.assert_close(CFG(3.0)(model, asked)(X, T), x_0 + 3 * (x_2 - x_0))


@pytest.mark.parametrize("name", ["none", "autoguidance"])
def test_a_guidance_without_a_null_takes_no_negative(model, name):
    with pytest.raises(ValueError, match=rf"guidance={name} takes no negative request.*negative\.kind.*guidance=cfg"):
        guidance(name, model)(model, ASK | {"negative.kind": ASK["kind"]})


OF_CONTROLS = {"within"}  # is about a ControlNet, which this file's model has not: tests/interop/test_controlnet.py
NAMES = sorted({path.stem for path in (CONFIGS / "guidance").glob("*.yaml")} - OF_CONTROLS)
SETTINGS = {"scales": {"scales": {"kind": 3.0}}}  # the shipped one leaves the names to the user


def guidance(name, model, **settings):
    """The configured member, for this file's model; its weak model has weights of its own."""
    shipped = compose_config("train", [f"guidance={name}"]).guidance
    node = OmegaConf.to_container(shipped) | SETTINGS.get(name, {}) | settings
    built = build(node)
    return replace(built, weak=partial(weaker, model)) if name == "autoguidance" else built


def weaker(model):
    weak = copy.deepcopy(model)
    for p in weak.denoiser.parameters():
        p.data.mul_(0.9)
    return weak


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_guidance_treats_each_picture_alone(model, name):
    chosen = guidance(name, model)
    whole = chosen(model, ASK)(X, T)
    for i in range(2):
        alone = chosen(model, {k: v[i : i + 1] for k, v in ASK.items()})(X[i : i + 1], T)
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-4, rtol=1e-4)


NEUTRAL = {
    "none": {},
    "cfg": {"scale": 1.0},
    "interval": {"low": 1e9},
    "autoguidance": {"scale": 1.0},
    "scales": {"scales": {"kind": 1.0}},
}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_guidance_is_the_identity_to_the_bit_where_neutral_and_calls_once(model, name):
    calls = count_calls(model)
    assert torch.equal(
        guidance(name, model, **NEUTRAL.get(name, {}))(model, ASK)(X, T), model.denoiser(X, T, model.condition(ASK))
    )
    assert calls == [2, 2]


def count_calls(model):
    """-> the batch sizes that the network is called with from now on."""
    sizes = []
    model.denoiser.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


@torch.no_grad()
def test_an_interval_of_everything_is_what_it_holds_and_outside_calls_once(model):
    cfg, calls = CFG(3.0), count_calls(model)
    whole = Interval(0.0, 1e9, cfg)(model, ASK)
    assert torch.equal(whole(X, T), cfg(model, ASK)(X, T))
    part = Interval(0.5, 2.0, cfg)(model, ASK)
    times = torch.tensor([0.2, 0.5])  # sigma / alpha = 0.25, 1
    calls.clear()
    outside, inside = part(X, times[0]), part(X, times[1])
    assert calls == [2, 4]
    both = part(X, times)
    torch.testing.assert_close(both, torch.stack((outside[0], inside[1])), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rescaling_brings_back_the_std_of_the_unguided(model):
    """Equations 15 and 16 of https://arxiv.org/abs/2305.08891, at 0, 1 and between."""
    cond = model.denoiser(X, T, model.condition(ASK))
    plain, full, half = (CFG(60.0, rescale)(model, ASK)(X, T) for rescale in (0.0, 1.0, 0.5))
    std = [v.flatten(1).std(1) for v in (cond, plain, full)]
    torch.testing.assert_close(std[2], std[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(std[1], std[0], rtol=2e-3)
    torch.testing.assert_close(half, (plain + full) / 2, atol=1e-4, rtol=1e-3)
    assert torch.equal(plain, CFG(60.0)(model, ASK)(X, T))


@torch.no_grad()
def test_autoguidance_moves_away_from_the_weak_model(model):
    weak, cond = weaker(model), model.condition(ASK)
    x_strong, x_weak = model.denoiser(X, T, cond), weak.denoiser(X, T, cond)
    drawn = guidance("autoguidance", model, scale=2.5)(model, ASK)(X, T)
    torch.testing.assert_close(drawn, x_weak + 2.5 * (x_strong - x_weak))
    other = copy.deepcopy(model)
    other.denoiser.schedule = Cosine()
    with pytest.raises(ValueError, match=r"weak model's schedule is Cosine.*guidance\.weak\.path"):
        Autoguidance(lambda: other)(model, ASK)


@torch.no_grad()
def test_a_scale_per_condition():
    """Equation 3 of https://arxiv.org/abs/2211.09800; one scale for all is classifier-free guidance."""
    model = three_conditions()
    ask = {n: torch.tensor([1, 2]) for n in "abc"}
    x0, x1, x2 = (model.denoiser(X, T, model.condition(ask, only=only)) for only in (["c"], ["a", "c"], None))
    drawn = Scales({"a": 1.5, "b": 4.0})(model, ask)(X, T)
    torch.testing.assert_close(drawn, x0 + 1.5 * (x1 - x0) + 4.0 * (x2 - x1), atol=1e-4, rtol=1e-3)
    same = Scales({"a": 3.0, "b": 3.0, "c": 3.0})(model, ask)(X, T)
    torch.testing.assert_close(same, CFG(3.0)(model, ask)(X, T), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="conditions"):
        Scales({"d": 2.0})(model, ask)


@torch.no_grad()
def test_guidances_nest(model):
    """Autoguidance in an interval in an interval."""
    inner = Autoguidance(partial(weaker, model), 2.0)
    nested = Interval(0.1, 10.0, Interval(1.0, 10.0, inner))
    torch.testing.assert_close(nested(model, ASK)(X, T), inner(model, ASK)(X, T))
    assert torch.equal(nested(model, ASK)(X, torch.tensor(0.2)), Unguided()(model, ASK)(X, torch.tensor(0.2)))


def guidance_of(words):
    config = compose_config("sample", ["model=m", *words])
    return build(as_usual(OmegaConf.to_container(config), {})["guidance"])


def test_guidances_are_chosen_and_nest_on_the_command_line():
    """Other conditions than the shipped example's, and another guidance inside an interval."""
    assert guidance_of(["guidance=scales", "guidance.scales={map: 1.5, text: 7.5}"]) == Scales({"map": 1.5, "text": 7.5})
    nested = ["guidance=interval", "guidance@guidance.inner=autoguidance", "guidance.inner.weak.path=w", "guidance.inner.scale=3"]
    built = guidance_of(nested)
    assert isinstance(built, Interval) and isinstance(built.inner, Autoguidance) and built.inner.scale == 3
