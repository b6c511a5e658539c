"""The adversary, the codebook and the terms of the autoencoding stage: who learns from what, in one process and in two."""

import json
from itertools import permutations

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from helpers.autoencoding import SIZE, sgd, stage_of
from helpers.training import assert_same, exact, small, trainer
from ldm.autoencoder.kl import KL
from ldm.autoencoder.vq import VQ
from ldm.build import load_autoencoder
from ldm.loss.adversary import Hinge, NonSaturating, PatchGAN
from ldm.loss.features import Features
from ldm.training.callback.checkpoint import WholeCheckpointIO
from ldm.training.callback.compile import Compile
from ldm.training.callback.ema import EMA
from ldm.training.callback.latents import Latents
from ldm.training.callback.preview import Reconstructions
from ldm.training.feed import data_of
from ldm.training.optimizer.rate import Constant, Linear
from ldm.training.run import fit
from ldm.training.stage.adversary import balance_of
from ldm.training.stage.augment import Augment
from ldm.training.stage.autoencoding import Autoencoding
from ldm.types import Draw


class Watch(pl.Callback):
    """Global step and weights after each batch."""

    def __init__(self):
        self.steps, self.weights = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(trainer.global_step)
        self.weights.append([p.detach().clone() for p in module.adversary.network.parameters()])


def run(stage, emoji_root, folder, steps, callbacks=(), **settings):
    made = trainer(folder, steps, callbacks=list(callbacks), enable_checkpointing=False, **settings)
    made.fit(stage, small(emoji_root), weights_only=True)
    return made


# ---- who learns from what


def test_the_discriminator_learns_from_its_own_loss_alone(emoji_root, clip_folder, tmp_path):
    """Gradients of each of the autoencoder's terms reach encoder and decoder, none the discriminator, and the other way round."""
    stage = stage_of()
    run(stage, emoji_root, tmp_path, 1)
    stage.perceptual = Features(f"local-dir:{clip_folder}")
    stage.zero_grad(set_to_none=True)
    images = torch.rand(8, 3, 8, 8) * 2 - 1
    output = stage.autoencoder.reconstruct(stage.autoencoder.posterior(images).mean)
    loss, parts = stage.reconstruction(output, images)
    opposition, terms = stage.adversary.oppose(output, loss, stage.autoencoder.last_layer)
    assert parts.keys() == {"l1", "l2", "perceptual"}
    for term in (*parts.values(), loss, terms["generator"], opposition):
        stage.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        assert stage.autoencoder.last_layer.grad.abs().max() > 0
        assert stage.autoencoder.encoder.conv_in.weight.grad.abs().max() > 0
        assert all(p.grad is None for p in stage.adversary.parameters())
    stage.zero_grad(set_to_none=True)
    stage.adversary.learn(images, output.detach(), stage.trainer)
    assert all(p.grad.abs().max() > 0 for p in stage.adversary.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in stage.autoencoder.parameters())


def test_one_step_is_one_autoencoder_update_and_the_adversary_enters_at_its_start(emoji_root, tmp_path):
    """Also with accumulation: `start` counts updates of the autoencoder, and nothing is counted twice."""
    watch, ema = Watch(), EMA(0.9)
    stage = stage_of(start=2)
    before = [p.detach().clone() for p in stage.adversary.network.parameters()]
    made = run(stage, emoji_root, tmp_path, 4, [watch, ema], accumulate_grad_batches=2)
    assert watch.steps == [0, 1, 1, 2, 2, 3, 3, 4] and ema.updates == made.global_step == 4
    still = [all(torch.equal(a, b) for a, b in zip(before, weights)) for weights in watch.weights]
    assert still == [True, True, True, True, True, False, False, False]
    assert not [name for name in ema.average if name.startswith("adversary")]
    assert all(p.grad is None for p in stage.adversary.parameters())


def test_both_rates_are_read_at_the_autoencoders_step(emoji_root, tmp_path):
    stage = stage_of()
    stage.adversary.rate = Linear(steps=10)
    run(stage, emoji_root, tmp_path, 5)
    assert stage.adversary.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.6)


def test_the_discriminator_is_clipped_as_the_autoencoder(emoji_root, tmp_path):
    """SGD at rate 1 moves by at most the clip norm."""
    stage = stage_of(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    before = nn.utils.parameters_to_vector(stage.adversary.network.parameters()).clone()
    run(stage, emoji_root, tmp_path, 1, gradient_clip_val=1e-3)
    after = nn.utils.parameters_to_vector(stage.adversary.network.parameters())
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_accumulated_gradients_of_the_discriminator_are_those_of_the_whole_batch(emoji_root, tmp_path):
    """With a fixed weight all losses are means over pictures, so two halves are one batch."""
    whole, halves = (stage_of(optimizer=sgd) for _ in range(2))
    for stage, count in ((whole, 1), (halves, 2)):
        stage.adversary.adaptive = False
        made = trainer(tmp_path, 3, accumulate_grad_batches=count, enable_checkpointing=False)
        made.fit(*exact(stage, small(emoji_root)))
    assert_same(halves.state_dict(), whole.state_dict())


def test_half_precision_scales_both_losses_and_unscales_both_gradients(emoji_root, tmp_path):
    """A gradient scaler whose scale is 2^10, around float32: the same weights as without it."""

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    plain, scaled = stage_of(optimizer=sgd), stage_of(optimizer=sgd)
    run(plain, emoji_root, tmp_path, 3, gradient_clip_val=0.1)
    precision = Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    run(scaled, emoji_root, tmp_path, 3, gradient_clip_val=0.1, plugins=[WholeCheckpointIO(), precision])
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_bfloat16_trains_both(emoji_root, tmp_path):
    stage, watch = stage_of(VQ), Watch()
    run(stage, emoji_root, tmp_path, 2, [watch], precision="bf16-mixed")
    assert any(not torch.equal(a, b) for a, b in zip(*watch.weights))
    assert all(weight.isfinite().all() for weight in stage.state_dict().values())


# ---- the terms


def test_adversarial_losses_are_their_closed_forms():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert Hinge().discriminator(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert Hinge().generator(fake).item() == pytest.approx(1.5)
    cross = nn.functional.binary_cross_entropy_with_logits
    wanted = 0.5 * (cross(real, torch.ones(2)) + cross(fake, torch.zeros(2)))
    torch.testing.assert_close(NonSaturating().discriminator(real, fake), wanted)
    torch.testing.assert_close(NonSaturating().generator(fake), cross(fake, torch.ones(2)))


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    layer, x = nn.Parameter(torch.randn(3, 4)), torch.randn(5, 4)
    first, second = (x @ layer.T).square().mean(), 30 * (x @ layer.T).sin().mean()
    weight = balance_of(first, second, layer)
    a, b = (torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (first, weight * second))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


def test_a_learned_log_variance_ends_at_the_log_of_the_loss(emoji_root, tmp_path):
    """s minimises loss / exp(s) + s at s = log(loss); it is among what the optimizer moves."""
    stage = stage_of(against=False, log_variance=0.0)
    before = stage.log_variance.item()
    run(stage, emoji_root, tmp_path, 2)
    assert stage.log_variance.item() != before
    images = torch.rand(2, 3, 8, 8)
    s = stage.log_variance
    optimizer = torch.optim.SGD([s], lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        loss, terms = stage.reconstruction(images + 0.25, images)
        loss.backward()
        optimizer.step()
    assert terms["log_variance"].item() == pytest.approx(torch.log(terms["l1"]).item(), abs=1e-3)


def test_patchgan_sees_seventy_pixels_and_one_picture():
    net = PatchGAN(width=8).eval()
    images = torch.randn(2, 3, 128, 128, requires_grad=True)
    logits = net(images)
    assert logits.shape == (2, 1, 14, 14)
    torch.testing.assert_close(net(images[1:]), logits[1:], atol=1e-5, rtol=1e-4)
    net.norms = nn.ModuleList(nn.Identity() for _ in net.norms)  # a norm looks at the whole picture
    net(images)[0, 0, 7, 7].backward()
    rows = images.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70 and not images.grad[1].any()
    with torch.device("meta"):
        assert sum(p.numel() for p in PatchGAN().parameters()) == 2_765_633


@pytest.mark.parametrize("size, layers", [(23, 2), (16, 2), (12, 2), (11, 1), (6, 1), (5, 0), (1, 0)])
def test_patchgan_names_the_most_layers_that_fit(size, layers):
    """And that many do fit; widths may be any number."""
    images, mend = torch.zeros(1, 3, size, size + 4), rf"network\.layers={layers}\." if layers else r"adversary=null: one layer"
    with pytest.raises(ValueError, match=rf"{size}x{size + 4} pixels are too small for 3 layers of patches, .*need 24; .*{mend}"):
        PatchGAN(width=20)(images)
    if layers:
        assert PatchGAN(width=20, layers=layers)(images).numel() > 0


def test_a_discriminator_that_enters_late_is_tried_at_once(emoji_root, tmp_path):
    stage = stage_of(start=1000)
    stage.adversary.network = PatchGAN(8, layers=2, groups=4).requires_grad_(False)
    with pytest.raises(ValueError, match=r"8x8 pixels are too small for 2 layers .*layers=1"):
        run(stage, emoji_root, tmp_path, 1)


# ---- resuming, and what two processes are compared by (training/test_ranks.py)


@pytest.mark.parametrize("kind, accumulate", [(KL, 1), (KL, 2), (VQ, 1)])
def test_resuming_in_the_middle_of_the_fight_is_exact_twice_in_a_row(kind, accumulate, emoji_root, tmp_path):
    """Bitwise: autoencoder, codebook, discriminator, and both optimizers' states."""

    def legs(*ends):
        checkpoint = None
        for end in ends:
            stage = stage_of(kind, start=2, seed=end if checkpoint else 0)
            made = trainer(tmp_path, end, enable_checkpointing=False, gradient_clip_val=1.0, accumulate_grad_batches=accumulate)
            made.fit(stage, small(emoji_root), ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / f"{len(ends)}-{end}.ckpt"
            made.save_checkpoint(checkpoint, weights_only=False)
        return torch.load(checkpoint, weights_only=True)

    whole, parts = legs(10), legs(1, 4, 10)
    assert any(name.startswith("adversary.network") for name in whole["state_dict"])
    for name, weight in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], weight), name
    for state in ("exp_avg", "exp_avg_sq", "step"):
        for number, kept in whole["adversary"]["state"].items():
            assert torch.equal(parts["adversary"]["state"][number][state], kept[state])


# ---- what is handed on, and what is shown


@pytest.mark.parametrize("kind", [KL, VQ])
def test_statistics_say_of_what_data_they_are(kind, emoji_root, tmp_path):
    """Beside the weights: mean and deviation of each channel, the exact count, size and fingerprint of the training shards."""
    stage, data = stage_of(kind, against=False), small(emoji_root)
    stage.recipe = {"_target_": f"ldm.autoencoder.{kind.__name__.lower()}.{kind.__name__}", **SIZE, "mult": [1, 2]}
    if kind is VQ:
        stage.recipe["codes"] = 16
    fit(stage, data, trainer(tmp_path, 2, enable_checkpointing=False), tmp_path)
    told, loaded = json.loads((tmp_path / "statistics.json").read_text()), load_autoencoder(str(tmp_path))
    assert told["count"] == len(data.train_set) == loaded.count and told["size"] == 8
    assert told["fingerprint"] == data.train_set.index.fingerprint()
    torch.testing.assert_close(torch.tensor(told["std"]), loaded.std)
    images = torch.cat([data.on_after_batch_transfer(b, 0)["image"] for b in data.ordered("train", 16)])
    with torch.no_grad():
        latents = loaded.encode(images)
    assert latents.mean.mean((0, 2, 3)).abs().max() < 1e-4
    variance = (latents.mean.square() + latents.std.square()).mean((0, 2, 3))
    torch.testing.assert_close(variance, torch.ones(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spoil, found", [(0.0, "mean 0.75 and deviation"), (float("nan"), "mean nan and deviation nan")])
def test_a_channel_that_says_nothing_is_refused_by_name(spoil, found, emoji_root, tmp_path):
    """Whitened by a deviation of zero it would be infinite."""
    stage = stage_of(VQ, against=False)
    made = run(stage, emoji_root, tmp_path, 1)
    with torch.no_grad():
        stage.autoencoder.quant_conv.weight[1] = spoil
        stage.autoencoder.quant_conv.bias[1] = 0.75
    with pytest.raises(ValueError, match=rf"cannot be whitened: .*, channel 1 has {found}.*autoencoder\.channels=1"):
        stage.finish(data_of(made))
    assert torch.equal(stage.autoencoder.std, torch.ones(2))


@pytest.mark.parametrize("kind", [KL, VQ])
def test_latents_and_reconstructions_are_shown(kind, emoji_root, tmp_path):
    stage, data = stage_of(kind, against=False), small(emoji_root)
    callbacks = [Latents(str(tmp_path / "latents"), 2), Reconstructions(str(tmp_path / "previews"), 2, count=11)]
    run(stage, emoji_root, tmp_path, 2, callbacks)
    told = json.loads((tmp_path / "latents" / "00000002.json").read_text())
    data.setup()
    images = torch.cat([data.on_after_batch_transfer(b, 0)["image"] for b in data.ordered("val", 16)])
    with torch.no_grad():
        moments = stage.autoencoder.posterior(images)
        if kind is KL:
            wanted = torch.distributions.kl_divergence(
                torch.distributions.Normal(moments.mean, moments.std), torch.distributions.Normal(0.0, 1.0)
            )
            assert told["kl"] == pytest.approx(wanted.sum().item() / len(images), rel=1e-4)
        else:
            used = stage.autoencoder.used(stage.autoencoder.quantise(moments.mean)[1])
            assert told["usage"] == pytest.approx(used["usage"].item())
            assert told["perplexity"] == pytest.approx(used["perplexity"].item(), rel=1e-4)
    assert len(told["mean"]) == len(told["std"]) == 2
    shown = Image.open(tmp_path / "previews" / "00000002.png")
    assert shown.size == (8 * 9 + 1, 6 * 9 + 1), "originals, reconstructions, differences, twice: rows of 8 pictures of 8 pixels"
    assert shown.crop((3 * 9 + 1, 3 * 9 + 1, 73, 55)).getextrema() == ((255, 255),) * 3, "3 pictures in the second row"
    assert Image.open(tmp_path / "latents" / "00000002.png").width > 400


# ---- bad input


def test_draws_are_the_stages_own(emoji_root, tmp_path):
    """The adversary adds no random numbers: a run with weight 0 trains the autoencoder as one without it."""
    alone, watched = stage_of(against=False, optimizer=sgd), stage_of(optimizer=sgd)
    watched.adversary.weight = 0.0
    for stage in (alone, watched):
        run(stage, emoji_root, tmp_path, 2)
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(watched.state_dict()[name], weight, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
def test_compiled_parts_train_to_the_same_weights(emoji_root, tmp_path):
    """Traced forward and backward, without a code generator; names of weights stay, and the adaptive weight is found."""
    plain, compiled = stage_of(optimizer=sgd), stage_of(optimizer=sgd)
    run(plain, emoji_root, tmp_path, 2)
    run(compiled, emoji_root, tmp_path, 2, [Compile(backend="aot_eager")])
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    with pytest.raises(ValueError, match=r"callback\.compile\.parts: Autoencoding has no part decoder"):
        run(stage_of(), emoji_root, tmp_path, 1, [Compile(["decoder"])])


def test_augmented_pictures_are_turned_and_recoloured_originals():
    """Whatever the share, each is one of the 8 symmetries of its square with its channels in one of 6 orders, and its draw's."""
    images, draw = torch.rand(64, 3, 4, 4), Draw(0, torch.arange(64), 64)
    augment = Augment(mirror=0.5, upend=0.5, turn=0.5, recolour=0.5)
    changed = augment(images, draw)
    turns = [f(g) for g in (images, images.flip(3), images.flip(2), images.flip(2, 3)) for f in (lambda x: x, lambda x: x.mT)]
    every = torch.stack([t[:, list(order)] for t in turns for order in permutations(range(3))])
    assert ((every == changed).flatten(2).all(2).sum(0) == 1).all()
    assert 0.6 < (changed != images).flatten(1).any(1).float().mean() < 1
    part = augment(images[5:9], Draw(0, torch.arange(5, 9), 64))
    assert torch.equal(part, changed[5:9]) and torch.equal(Augment()(images, draw), images)
    with pytest.raises(ValueError, match=r"4x6 pixels cannot be turned; set training\.augment\.turn=0"):
        augment(torch.zeros(1, 3, 4, 6), Draw(0, torch.arange(1), 1))


def test_the_perceptual_distance_is_of_a_share_of_the_pictures_in_training():
    class Distance(nn.Module):
        def forward(self, images, targets):
            return (images - targets).abs().mean()

    stage = Autoencoding(KL(**SIZE), Distance(), 1.0, 0.0, optimizer=sgd, rate=Constant(), seed=0, batch=8, perceptual_share=0.3)
    output, images = torch.zeros(8, 3, 8, 8), torch.arange(8.0)[:, None, None, None].expand(8, 3, 8, 8)
    assert stage.train().reconstruction(output, images)[1]["perceptual"] == 1.0, "of pictures 0, 1 and 2"
    assert stage.eval().reconstruction(output, images)[1]["perceptual"] == 3.5, "of all"
    with pytest.raises(ValueError, match=r"perceptual_share=0\.0: wanted more than 0"):
        Autoencoding(KL(**SIZE), None, 0.0, 0.0, optimizer=sgd, rate=Constant(), seed=0, batch=8, perceptual_share=0.0)
