"""Width that transfers: sizes and rates by the rules, hidden states that stay as large over widths, and what does not go."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from ldm.autoencoder.identity import Identity
from ldm.backbone.dit import DiT
from ldm.backbone.unet import UNet
from ldm.build import build_stage
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.condition.label import Label
from ldm.conditioner import Conditioner
from ldm.denoiser import DataTime, Denoiser
from ldm.errors import Refusal
from ldm.model import LatentModel
from ldm.nn.layers import mlp
from ldm.objective.regression import Regression
from ldm.prediction import Flow
from ldm.schedule import Linear
from ldm.training.coordinates import coordinates, slopes
from ldm.training.optimizer.muon import Muon
from ldm.training.optimizer.mup import MuP
from ldm.training.optimizer.rate import Constant
from ldm.training.stage.diffusion import Diffusion
from ldm.types import Widths

BATCH = {"image": torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
BATCH |= {"label": torch.arange(8), "position": torch.arange(8)}
DIT = partial(DiT, size=8, patch=2, depth=2, vector=mlp, rotary=True, swiglu=True)
UNETS = partial(UNet, mult=(1, 2), res_blocks=1, depth=(0, 1), head_width=8, groups=4)
MAKE = {"dit": lambda width: partial(DIT, width=width, heads=width // 8), "unet": lambda width: partial(UNETS, width=width)}
BASE = {"dit": {"width": 16}, "unet": {"width": 16}}


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def stage(kind, width, mup=True, optimizer=adamw):
    torch.manual_seed(0)
    conditioner = Conditioner({"label": Label(9, 8, slot="vector", rate=0.0)})
    backbone = MAKE[kind](width)
    net = backbone(channels=3, widths=conditioner.widths)
    model = LatentModel(Identity(), conditioner, Denoiser(net, Linear(), Flow(), DataTime()))
    given = MuP(backbone, BASE[kind]) if mup else None
    settings = {"optimizer": optimizer, "rate": Constant(), "seed": 0, "batch": 8}
    return Diffusion(model=model, objective=Regression(), parametrization=given, **settings).train()


def exponents(kind, widths, mup, rate):
    found = {}
    for width in widths:
        one = stage(kind, width, mup, lambda params: torch.optim.AdamW(params, lr=rate))
        found[width] = coordinates(one, one.model.denoiser.backbone, BATCH)
    return slopes(found)


@pytest.mark.parametrize("kind, widths, rate", [("dit", (32, 64, 128), 1e-2), ("unet", (32, 64, 128), 2e-3)])
def test_hidden_states_move_as_far_at_every_width(kind, widths, rate):
    """Under muP no block's change grows with the width, or falls, after 4 steps of Adam; as usual the last ones' do."""
    steady, usual = (exponents(kind, widths, mup, rate) for mup in (True, False))
    assert max(abs(slope) for slope in steady.values()) < 0.25, steady
    assert max(usual.values()) > 0.6, usual


@pytest.mark.parametrize("kind", BASE)
def test_sizes_and_rates_are_by_the_rules(kind):
    """From width to width 1 / sqrt(r) and 1 / r, to a fixed number 1 / r both, from a fixed number as in the base network."""
    wide, base, plain = stage(kind, 64), stage(kind, 16, mup=False), stage(kind, 64, mup=False)
    scales, small = wide.scales(), dict(base.model.named_parameters())
    seen = set()
    for name, module in wide.model.denoiser.backbone.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        name = f"denoiser.backbone.{name}.weight"
        weight, other = module.weight, small[name]
        r = weight.shape[1:].numel() / other.shape[1:].numel()
        assert scales.get(f"model.{name}", 1.0) == 1 / r
        size, before = (x.square().mean().sqrt().item() for x in (weight, other))
        rule = 1.0 if r == 1 else 1 / r if weight.shape[0] == other.shape[0] else r**-0.5
        assert size == pytest.approx(rule * before, rel=0.25 if other.numel() < 200 else 0.12)
        seen.add(rule)
    assert len(seen) >= 3
    assert all(x.equal(y) for (n, x), (_, y) in zip(wide.named_parameters(), plain.named_parameters()) if x.ndim < 2)
    rates = {id(p): group["lr"] for group in wide.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    wanted = {n: 1e-2 * scales.get(n, 1.0) for n, p in wide.named_parameters() if p.requires_grad}
    assert {n: rates[id(p)] for n, p in wide.named_parameters() if p.requires_grad} == pytest.approx(wanted)


def test_at_the_base_width_it_is_nothing_to_the_bit():
    one, other = stage("dit", 16), stage("dit", 16, mup=False)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters())) and one.scales() == {}
    groups = [s.configure_optimizers()["optimizer"].param_groups for s in (one, other)]
    assert [[g["lr"], len(g["params"])] for g in groups[0]] == [[g["lr"], len(g["params"])] for g in groups[1]]


def test_what_does_not_go_is_named():
    wide = partial(DIT, width=64, heads=2)
    model = LatentModel(Identity(), Conditioner({}), Denoiser(wide(channels=3, widths=Widths()), Linear(), Flow(), DataTime()))
    with pytest.raises(ValueError, match=r"heads of attention are 32 wide, and 8 in the base network.*parametrization\.small\.h"):
        MuP(lambda **given: DIT(width=16, heads=2, **given), {}).start(model)
    with pytest.raises(ValueError, match=r"the 2 heads of backbone\.width=64 are 0\.5 of that width.*a multiple of 32"):
        MuP(wide, {"width": 16}).scales(model)
    with pytest.raises(ValueError, match=r"rules of Adam: optimizer=adamw \(found Muon\)"):
        stage("dit", 32, optimizer=Muon).configure_optimizers()


def words(root, *more):
    said = ["experiment=emoji/class", "backbone=dit", "autoencoder=identity", "optimizer=adamw", "parametrization=mup"]
    said += ["data=emoji", f"data.root={root}", "data.groups=[Activities]", "data.val_fraction=0.2"]
    said += ["data.batch=8", "data.size=8"]
    size = {"width": 32, "heads": 4, "depth": 1, "patch": 2, "size": 8}
    said += [f"backbone.{name}={value}" for name, value in size.items()]
    return compose_config("train", [*said, "parametrization.small.width=32", *more])


@pytest.mark.slow
def test_the_check_is_a_command_with_a_plot(emoji_root, tmp_path, capsys):
    config = words(emoji_root, "coordinates=[32,64]", f"folder={tmp_path}")
    folder = train(config)
    kept = json.loads((folder / "coordinates.json").read_text())
    assert kept["sizes"].keys() == {"32", "64"} and kept["exponents"].keys() == {"block 1", "output"}
    assert "<svg" in (folder / "coordinates.html").read_text() and "over the widths" in capsys.readouterr().out
    assert not list(folder.glob("**/*.ckpt"))
    for wrong, why in (([32], "two widths"), ([32, 36], r"at width 36 there are 4\.5 heads.*multiples of 8")):
        config.coordinates = wrong
        with pytest.raises(Refusal, match=why):
            train(config)


def test_a_fine_tuning_has_none():
    config = compose_config("train", ["training=finetune", "parametrization=mup", "model.init=none"])
    with pytest.raises(Refusal, match="parametrization=mup is of training=diffusion"):
        build_stage(config)
