"""Guidance on a whole model, told by two conditions of which one is never dropped."""

import pytest
import torch
from torch import nn

from ldm.autoencoder.identity import Identity
from ldm.backbone.unet import UNet
from ldm.command_line import CONFIGS
from ldm.condition.conditioner import Conditioner
from ldm.condition.label import Label
from ldm.denoiser import Denoiser, LogRatio
from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.model import LatentModel
from ldm.prediction import Flow
from ldm.schedule import Linear

ASK = {"kind": torch.tensor([1, 2]), "size": torch.tensor([0, 3])}


@pytest.fixture
def model():
    conditioner = Conditioner({"kind": Label(4, 8, key="kind", rate=0.1), "size": Label(4, 8, key="size", rate=0.0)})
    net = UNet(3, conditioner.widths, width=8, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return LatentModel(Identity(), conditioner, Denoiser(net, Linear(), Flow(), LogRatio())).eval()


X, T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(0.6)


@torch.no_grad()
def test_one_is_unguided_to_the_bit_and_zero_is_the_null(model):
    cond, null = (model.denoiser(X, T, c) for c in (model.tell(ASK), model.tell(ASK, only=())))
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
@pytest.mark.parametrize("config", sorted((CONFIGS / "guidance").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_guidance_treats_each_picture_alone(model, config):
    from omegaconf import OmegaConf

    from ldm.build import build

    guidance = build(OmegaConf.load(config))
    whole = guidance(model, ASK)(X, T)
    for i in range(2):
        alone = guidance(model, {k: v[i : i + 1] for k, v in ASK.items()})(X[i : i + 1], T)
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-4, rtol=1e-4)
