"""The representation autoencoder: its parts, its recipes shrunken, and where the frozen encoder rests."""

import json
import shutil

import pytest
import torch

from ldm.autoencoder.rae import RAE
from ldm.build import build, build_stage, load_autoencoder, load_model
from ldm.command.sample import sample
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, save_model
from ldm.nn.empty import weightless
from ldm.nn.vit import ViT
from ldm.schedule import Linear, by_dimension
from ldm.training.saved import read_checkpoint
from ldm.types import Draw

ENCODER = {"patch": 2, "width": 8, "depth": 1, "heads": 2, "inner": 16, "side": 4, "registers": 2}
DECODER = {"side": 4, "factor": 3, "width": 16, "depth": 1, "heads": 2, "inner": 32}


def small(**settings):
    return RAE(ViT(**ENCODER), **{**DECODER, **settings})


def test_each_latent_is_decoded_where_it_lies():
    """One patch's colours are the last layer's, row by row, red, green and blue of each pixel."""
    net = small(pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
    with torch.no_grad():
        net.decoder.out.weight.zero_()
        net.decoder.out.bias.copy_(torch.arange(27.0))
    picture = net.decode(torch.randn(2, 8, 4, 4))
    assert picture.shape == (2, 3, 12, 12)
    assert torch.equal(picture[1, :, 3:6, 9:12], torch.arange(27.0).view(3, 3, 3).permute(2, 0, 1))


def test_the_decoder_learns_from_noisy_latents_by_position():
    """z + tau u n, the same for a sample wherever it stands in a batch; none in validation."""
    net, images = small(noise=0.5).train(), torch.rand(4, 3, 12, 12) * 2 - 1
    clean = net.posterior(images).mean
    draw = Draw(0, torch.arange(4), 4)
    noisy, terms = net.bottleneck(images, draw)
    wanted = 0.5 * draw.uniform("noise level").view(4, 1, 1, 1) * draw.normal("noise", (8, 4, 4))
    torch.testing.assert_close(noisy, clean + wanted)
    torch.testing.assert_close(net.bottleneck(images[2:], Draw(0, torch.arange(2, 4), 4))[0], noisy[2:])
    assert terms == {} and torch.equal(net.eval().bottleneck(images, draw)[0], clean)


def test_features_are_white_by_patch_and_need_no_gradient():
    """The encoder's last norm has no weights."""
    told = small().posterior((torch.rand(2, 3, 12, 12) * 2 - 1).requires_grad_())
    torch.testing.assert_close(told.mean.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(told.mean.var(1, correction=0), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    assert not told.mean.requires_grad and not told.std.any()


@pytest.mark.parametrize("call, words", [("encode", r"data\.size=12"), ("decode", r"here 4x4")])
def test_another_size_is_refused(call, words):
    x = torch.zeros(1, 3, 16, 16) if call == "encode" else torch.zeros(1, 8, 5, 5)
    with pytest.raises(Refusal, match=words):
        getattr(small(), call)(x)


def test_times_are_shifted_by_the_latents_dimension():
    """t' = a t / (1 + (a - 1) t), a = sqrt(m / n) (2510.11690, section 4.2): six times what hides 4,096 numbers hides 147,456."""
    t = torch.linspace(0, 1, 11)
    a, (_, plain), (_, sigma) = 6.0, Linear()(t), by_dimension(36 * 4096)(t)
    torch.testing.assert_close(sigma, a * plain / (1 + (a - 1) * plain))
    assert by_dimension(4096) == Linear() and by_dimension(16 * 16 * 768).shift == pytest.approx(48**0.5)
    with pytest.raises(Refusal, match=r"schedule\.numbers=0"):
        by_dimension(0)


# ---- the recipes


@pytest.mark.parametrize("name, count", [("rae/dinov2_b", 415_056_640), ("rae/dit_dh_xl", 838_085_716)])
def test_recipes_have_their_published_size(name, count):
    """Of the decoder; of the network 839 million, whose noise level is told by 512 numbers there, by 256 here."""
    config = compose_config(
        "train", [f"experiment={name}", "data=shards", "data.train=x", "training.perceptual=null"][: 4 if "dino" in name else 3]
    )
    if "dit" in name:
        config.autoencoder = compose_config("train", ["autoencoder=rae"]).autoencoder
    with weightless():
        stage = build_stage(config)
    assert sum(p.numel() for p in stage.parameters() if p.requires_grad) == count


@pytest.fixture(scope="module")
def home(tmp_path_factory, emoji_root):
    """runs/encoder, a representation autoencoder, and on its encoder runs/rae/autoencoder after two steps and two more, and
    runs/rae/at_once after four.
    """
    runs = tmp_path_factory.mktemp("runs")
    shared = [f"runs={runs}", f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2", "size=tiny"]
    shared += ["logger=[]", "data.batch=8", "trainer.log_every_n_steps=2", "callback.checkpoint.every=2"]
    ours = ["experiment=rae/dinov2_b", *shared, "training.perceptual=null", "adversary.start=1", "rate.steps=4"]
    ours += ["autoencoder.width=32", "autoencoder.depth=1", "autoencoder.inner=64"]
    stage = build_stage(compose_config("train", [*ours, "seed=5"]))
    save_model(stage.autoencoder.state_dict(), stage.recipe, runs / "encoder")
    mine = [*ours, f"autoencoder.weights={runs}/encoder"]
    for steps in (2, 4):
        words = ["callback=[checkpoint,ema]", "run_id=rae/autoencoder", f"trainer.max_steps={steps}"]
        train(compose_config("train", [*mine, *words]))
    looks = ["callback.latents.every=4", "callback.reconstructions.every=4", "callback.reconstructions.count=2"]
    at_once = ["run_id=rae/at_once", "trainer.max_steps=4", "trainer.val_check_interval=4"]
    train(compose_config("train", [*mine, *at_once, *looks]))
    return runs, shared, mine


def test_it_goes_on_to_the_bit_and_no_checkpoint_holds_the_encoder(home):
    runs, _, _ = home
    resumed, once = (load_tensors(runs / "rae" / name / "model.safetensors") for name in ("autoencoder", "at_once"))
    assert resumed.keys() == once.keys() and all(torch.equal(x, once[n]) for n, x in resumed.items())
    checkpoint = read_checkpoint(runs / "rae" / "autoencoder" / "checkpoints" / "step-00000004.ckpt")
    assert not [n for n in checkpoint["state_dict"] if n.startswith("autoencoder.encoder.")]
    assert any(n.startswith("autoencoder.decoder.") for n in checkpoint["state_dict"])
    before = load_tensors(runs / "encoder" / "model.safetensors")
    encoder = [n for n in before if n.startswith("encoder.")]
    assert encoder and all(torch.equal(before[n], resumed[n]) for n in encoder)
    assert not torch.equal(before["decoder.out.weight"], resumed["decoder.out.weight"])
    assert json.loads((runs / "rae" / "at_once" / "latents" / "00000004.json").read_text()).keys() == {"mean", "std"}


def test_its_folder_is_whole_and_its_latents_are_white(home, tmp_path, emoji_root):
    """It is loaded where what the encoder came from is gone."""
    runs, shared, _ = home
    shutil.copytree(runs / "rae" / "autoencoder", tmp_path / "elsewhere")
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    net = load_autoencoder(str(tmp_path / "elsewhere"))
    assert config["weights"] == f"{runs}/encoder" and net.count > 0 and net.mean.shape == (32, 8, 8)
    data = build(compose_config("train", ["experiment=emoji/autoencoder", *shared]).data)
    data.prepare_data()
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch, 0)["image"] for batch in data.ordered("train", 16)]
    latents = torch.cat([net.encode(images).mean for images in batches]).double()
    torch.testing.assert_close(latents.mean(0), torch.zeros(32, 8, 8).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0, correction=0), torch.ones(32, 8, 8).double(), atol=1e-3, rtol=0)


def test_another_encoder_is_refused_where_training_goes_on_or_begins(home):
    runs, _, mine = home
    other = [word for word in mine if "autoencoder.weights" not in word]
    on = [*mine, "run_id=rae/autoencoder", "trainer.max_steps=5", "callback=[checkpoint,ema]"]
    with pytest.raises(Refusal, match=r"cannot change autoencoder\.weights: None \(before: "):
        train(compose_config("train", [*on, "autoencoder.weights=null"]))
    tensors, recipe = (
        load_tensors(runs / "encoder" / "model.safetensors"),
        json.loads((runs / "encoder" / "config.json").read_text()),
    )
    save_model({**tensors, "encoder.embed.bias": tensors["encoder.embed.bias"] + 1}, recipe, runs / "encoder")
    try:
        with pytest.raises(Refusal, match=r"frozen autoencoder\.encoder.* is not what the checkpoint was trained with"):
            train(compose_config("train", on))
    finally:
        save_model(tensors, recipe, runs / "encoder")
    begun = [*other, f"model.init={runs}/rae/at_once", "run_id=begun"]
    with pytest.raises(Refusal, match=r"another encoder\..*autoencoder\.weights="):
        build_stage(compose_config("train", [*begun, "autoencoder.weights=null", "seed=3"]))
    stage = build_stage(compose_config("train", [*begun, f"autoencoder.weights={runs}/encoder"]))
    wanted = load_tensors(runs / "rae" / "at_once" / "model.safetensors")
    assert torch.equal(stage.autoencoder.decoder.out.weight, wanted["decoder.out.weight"])


def test_a_model_on_it_trains_and_draws_from_a_folder_of_its_own(home, tmp_path):
    _, shared, _ = home
    sizes = ["backbone.width=32", "backbone.depth=2", "backbone.heads=2", "backbone.head=[48,1,3]", "condition.label.width=32"]
    words = ["experiment=rae/dit_dh_xl", *shared, *sizes, "run_id=rae/diffusion", "trainer.max_steps=2"]
    folder = train(compose_config("train", words))
    shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoints"))
    assert load_model(tmp_path / "moved").denoiser.schedule == by_dimension(2048)
    assert "rae/autoencoder" not in (tmp_path / "moved" / "config.json").read_text()
    with pytest.raises(Refusal, match=r"is of one size \(resolution=32\)"):
        sample(compose_config("sample", [f"model={tmp_path}/moved", "ask.label=3", "resolution=64", f"out={tmp_path}/out"]))
    drawn = sample(compose_config("sample", [f"model={tmp_path}/moved", "ask.label=3", "sampler.steps=2", f"out={tmp_path}/out"]))
    assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()
