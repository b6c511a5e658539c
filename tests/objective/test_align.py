"""Alignment of hidden states with a frozen network (REPA): the published formula, where it reaches, and what it leaves alone."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from helpers.training import adam, diffusion, small, trainer
from ldm.autoencoder.identity import Identity
from ldm.backbone.dit import DiT
from ldm.backbone.mlp import MLP
from ldm.backbone.unet import UNet
from ldm.conditioner import Conditioner
from ldm.denoiser import Denoiser, LogRatio
from ldm.extractor.clip import Clip
from ldm.extractor.timm import Timm
from ldm.model import LatentModel
from ldm.objective.align import Align, as_map
from ldm.objective.dmd import DMD
from ldm.objective.latent_consistency import LatentConsistency
from ldm.objective.preference import Preference
from ldm.objective.regression import Regression
from ldm.objective.route import Routing
from ldm.objective.uncertainty import Uncertainty
from ldm.prediction import Flow
from ldm.schedule import Linear
from ldm.training.callback.ema import EMA
from ldm.training.optimizer.rate import Constant
from ldm.training.saved import read_checkpoint
from ldm.training.stage.diffusion import Diffusion, Trained
from ldm.types import Cond, Draw, Widths

POSITION = torch.arange(4)
DRAW = Draw(0, POSITION, 4)
BATCH = {"image": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1, "position": POSITION}


class Teacher:
    """Fixed features of 4 x 4 patches."""

    def __init__(self):
        torch.manual_seed(7)
        self.net = nn.Conv2d(3, 5, 2, stride=2).requires_grad_(False)

    def patches(self, images):
        return self.net.to(images)(images)


def transformer():
    torch.manual_seed(0)
    net = DiT(3, Widths(), size=8, patch=2, width=16, depth=4, heads=2)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return LatentModel(Identity(), Conditioner({}), Denoiser(net, Linear(), Flow(), LogRatio()))


def align(**settings):
    torch.manual_seed(1)
    return Align(Teacher, **{"width": 16, "layer": 2, "hidden": 8} | settings)


def test_the_loss_is_repas_own():
    """As its loss.py has it, sample by sample: -(z * z_tilde).sum(-1) of unit vectors, averaged over patches, then the batch."""
    model, objective, heard = transformer(), align(), []
    model.denoiser.backbone.blocks[1].register_forward_hook(lambda *call: heard.append(call[-1]))
    said = objective(model, BATCH, BATCH["image"], Cond(), DRAW)
    plain = Regression()(model, BATCH, BATCH["image"], Cond(), DRAW)["loss"]
    projected = objective.projector(heard[0].transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
    published = torch.zeros(())
    for z, z_tilde in zip(Teacher().patches(BATCH["image"]).flatten(2).transpose(1, 2), projected):
        z, z_tilde = nn.functional.normalize(z, dim=-1), nn.functional.normalize(z_tilde, dim=-1)
        published = published - (z * z_tilde).sum(-1).mean() / 4
    torch.testing.assert_close(said["align"], published, atol=1e-6, rtol=0)
    torch.testing.assert_close(said["loss"], plain + 0.5 * published, atol=1e-6, rtol=0)


@pytest.mark.parametrize("projector", ["mlp", "convolution"])
def test_its_gradient_reaches_the_blocks_up_to_the_layer_and_the_projector_only(projector):
    model, objective = transformer(), align(projector=projector)
    objective(model, BATCH, BATCH["image"], Cond(), DRAW)["align"].backward()
    net = model.denoiser.backbone
    reached = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in net.blocks]
    assert reached == [True, True, False, False] and net.embed.weight.grad.any() and net.last.out.weight.grad is None
    assert all(p.grad.any() for p in objective.projector.parameters())


@pytest.mark.parametrize("settings", [{"align_weight": 0.0}, {"until": 3}], ids=str)
@pytest.mark.parametrize("of", [Regression, Uncertainty])
def test_left_out_it_is_the_other_objective_to_the_bit(settings, of):
    """At weight 0, and from step `until` on; the projector then has a gradient of zeros, for which processes would wait."""
    draw, grads = Draw(0, POSITION, 4, step=3), []
    for objective in (of(), align(of=of, **settings)):
        model = transformer()
        losses = objective(model, BATCH, BATCH["image"], Cond(), draw)
        losses["loss"].backward()
        grads.append([losses["loss"].detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and "align" not in losses
    assert all(not p.grad.any() for p in objective.projector.parameters())
    assert "align" in align(until=3)(transformer(), BATCH, BATCH["image"], Cond(), Draw(0, POSITION, 4, step=2))


def test_other_numbers_of_patches_are_brought_together():
    model, objective = transformer(), align()
    model.denoiser.backbone = DiT(3, Widths(), size=8, patch=1, width=16, depth=2, heads=2)
    assert -1 <= objective(model, BATCH, BATCH["image"], Cond(), DRAW)["align"] <= 1


def test_only_patches_are_compared_where_registers_and_tokens_stand_before_them():
    """The last tokens of the sequence, whichever samples the registers and the caption have; with routing they are fewer."""
    torch.manual_seed(0)
    settings = {"size": 8, "patch": 2, "width": 16, "depth": 4, "heads": 2, "registers": 3, "tokens": "joint"}
    net, heard = DiT(3, Widths(tokens=8), **settings), []
    net.blocks[1].register_forward_hook(lambda *call: heard.append(call[-1]))
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    model, objective = transformer(), align()
    model.denoiser.backbone = net
    cond = Cond(tokens=torch.randn(4, 9, 8), mask=torch.arange(9).expand(4, 9) < 7)
    said = objective(model, BATCH, BATCH["image"], cond, DRAW)
    assert heard[0].shape == (4, 3 + 7 + 16, 16)
    patches = heard[0][:, 10:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(said["align"], objective.alignment(patches, Teacher().patches(BATCH["image"])))
    with pytest.raises(ValueError, match="no feature a patch"):  # 3 + 7 + 8 tokens are more than there are patches
        align(of=partial(Routing, first=1, last=3))(model, BATCH, BATCH["image"], cond, DRAW)
    said = align(layer=4, of=partial(Routing, first=1, last=3))(model, BATCH, BATCH["image"], cond, DRAW)
    assert -1 <= said["align"] <= 1


UNET = partial(UNet, 3, Widths(), width=8, mult=(1, 3), res_blocks=1, depth=(0, 0), heads=1, groups=4)


@pytest.mark.parametrize("make, layer, wanted", [(None, 2, 16), (UNET, 1, 8), (UNET, 5, 24)], ids=["dit", "unet", "middle"])
def test_the_width_is_the_models_that_it_meets(make, layer, wanted):
    model, objective = transformer(), align(width=None, layer=layer)
    model.denoiser.backbone = model.denoiser.backbone if make is None else make()
    assert not objective.meet(model) and objective.projector[0].in_channels == wanted
    assert -1 <= objective(model, BATCH, BATCH["image"], Cond(), DRAW)["align"] <= 1
    assert not any(p.is_meta for p in model.parameters())
    usual = align(width=None, layer=None)
    usual.meet(model)
    assert usual.layer == (2 if make is None else 8)
    with pytest.raises(ValueError, match=r"objective\.layer=99: the backbone has"):
        align(width=None, layer=99).meet(model)
    model.denoiser.backbone = MLP(3, Widths(), size=16, width=8)
    with pytest.raises(ValueError, match=r"objective\.width must be said.*no feature a patch"):
        align(width=None, layer=1).meet(model)


def test_what_does_not_fit_is_named():
    model, x = transformer(), BATCH["image"]
    with pytest.raises(ValueError, match=r"objective\.layer=5: the backbone has 4 blocks"):
        align(layer=5)(model, BATCH, x, Cond(), DRAW)
    with pytest.raises(ValueError, match=r"Block 2 of the backbone says 16 features a patch: objective\.width=16 \(found 8\)"):
        align(width=8)(model, BATCH, x, Cond(), DRAW)
    with pytest.raises(ValueError, match="latents made ahead of time have no `image`"):
        align()(model, {"moments": x, "position": POSITION}, x, Cond(), DRAW)
    with pytest.raises(ValueError, match="no feature a patch"):
        as_map(torch.zeros(4, 15, 16), x, model.denoiser.backbone)


@pytest.mark.parametrize("of, why", [(DMD, "never the batch's pictures"), (Preference, "two pictures of each request")])
def test_around_what_sees_other_pictures_it_is_refused(of, why):
    with pytest.raises(ValueError, match=why):
        align(of=partial(of, transformer))
    with pytest.raises(ValueError, match=why):
        align(of=partial(Routing, of=partial(of, transformer)))


def test_around_a_distillation_it_hears_the_models_own_call():
    """The average's call comes before; the teacher stays frozen, and the model need not be told conditions."""
    model, objective = transformer(), align(of=partial(LatentConsistency, transformer, scale=1.0))
    assert objective.frozen == ("of.teacher.denoiser", "of.teacher.conditioner") and objective.meet(model)
    said = objective(Trained(model, lambda: model), BATCH, BATCH["image"], Cond(), DRAW)
    said["align"].backward()
    assert model.denoiser.backbone.embed.weight.grad.any()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_blocks_are_heard(whole):
    """Also once the model, with the ear, has been copied (for its average) and has drawn without the objective."""
    wanted = align()(transformer(), BATCH, BATCH["image"], Cond(), DRAW)["loss"]
    model, objective = transformer(), align()
    for part in [model.denoiser.backbone] if whole else model.denoiser.backbone.blocks:
        part.compile(backend="eager", dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(objective(model, BATCH, BATCH["image"], Cond(), DRAW)["loss"], wanted)
        model.denoiser(BATCH["image"], torch.tensor(0.5), Cond())
    torch._dynamo.reset()


def test_the_average_of_a_model_that_is_heard_is_a_copy_of_its_own():
    model, objective = transformer(), align()
    objective.ear.put(model.denoiser.backbone.blocks[1])
    other = copy.deepcopy(model)
    other.denoiser(BATCH["image"], torch.tensor(0.5), Cond())
    assert objective.ear.heard is None
    model.denoiser(BATCH["image"], torch.tensor(0.5), Cond())
    assert objective.ear.take().shape == (4, 16, 16) and objective.ear.heard is None


def stage_of(seed=0):
    objective = align(width=8)
    model = diffusion(seed).model
    stage = Diffusion(model=model, objective=objective, optimizer=adam, rate=Constant(), seed=0, batch=8)
    stage.frozen, stage.recipe = ("model.autoencoder",), {"a": 1}
    return stage


def test_resumed_to_the_bit_without_teacher_in_the_checkpoint_nor_projector_in_the_average(emoji_root, tmp_path):
    found = []
    for legs in ((4,), (2, 4)):
        checkpoint = None
        for steps in legs:
            stage, ema = stage_of(steps if checkpoint else 0), EMA(0.9)
            run = trainer(tmp_path, steps, callbacks=[ema], enable_checkpointing=False)
            run.fit(stage, small(emoji_root), ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / f"{len(legs)}-{steps}.ckpt"
            run.save_checkpoint(checkpoint)
        found.append(stage.state_dict() | {f"average.{n}": x for n, x in ema.average.items()})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], x) for n, x in found[1].items())
    kept = read_checkpoint(checkpoint)["state_dict"]
    assert "objective.projector.0.weight" in kept and not [n for n in kept if "teacher" in n]
    assert ema.average and not [n for n in ema.average if n.startswith("objective")]
    stage.export(tmp_path / "model")
    assert not [n for n in stage.weights if "projector" in n]


def test_teachers_say_what_is_where(clip_folder):
    """One vector a patch: open_clip's transformer, and timm's with its own norm behind it."""
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    clip = Clip(f"local-dir:{clip_folder}")
    side = clip.clip.visual.grid_size
    assert clip.patches(images).shape[2:] == side
    moved = images.clone()
    moved[:, :, :1, :1] = 1.0
    assert not torch.equal(clip.patches(images), clip.patches(moved))


def test_timms_patches_are_its_own_features(tmp_path):
    import timm

    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    teacher = Timm("vit_tiny_patch16_224", weights=str(tmp_path / "a.pth"), size=32)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    seen = ((images + 1) / 2 - torch.tensor(teacher.mean).view(3, 1, 1)) / torch.tensor(teacher.std).view(3, 1, 1)
    tokens = net.eval().forward_features(seen)[:, net.num_prefix_tokens :]
    torch.testing.assert_close(teacher.patches(images), tokens.transpose(1, 2).unflatten(2, (2, 2)))
