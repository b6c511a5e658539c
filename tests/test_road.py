"""The whole road, once and tiny: CLIP, autoencoder, latents, diffusion, pictures, numbers, report."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

from helpers.data import ODD
from ldm.build import load_autoencoder, load_model
from ldm.command.evaluate import evaluate
from ldm.command.precompute import precompute
from ldm.command.sample import sample
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.report.page import page, picture, read_curves, wall

DATA = ["data.groups=[Activities]", "data.val_fraction=0.2"]
STEPS = ["trainer.max_steps=3", "trainer.val_check_interval=2", "callback.checkpoint.every=2", "trainer.log_every_n_steps=1"]
CLIP = [
    "clip.text_cfg.width=16",
    "clip.text_cfg.heads=2",
    "clip.vision_cfg.layers=1",
    "clip.vision_cfg.width=32",
    "clip.embed_dim=8",
]
KL = ["autoencoder.width=8", "autoencoder.mult=[1,1,1]", "autoencoder.groups=4"]
UNET = ["backbone.width=16", "backbone.groups=4", "backbone.heads=2"]


@pytest.fixture(scope="module")
def road(tmp_path_factory, emoji_root):
    """quickstart/{clip,autoencoder,latents,diffusion}, a few steps each, in a folder of a name with signs."""
    runs = tmp_path_factory.mktemp("runs") / ODD
    shared = [f"runs={runs}", "logger=[csv]", "data.batch=8"]
    emoji = [f"data.root={emoji_root}", *DATA]
    where = "run_id=quickstart/"
    train(compose_config("train", ["experiment=emoji/clip", where + "clip", *shared, *emoji, *STEPS, *CLIP]))
    preview = ["callback.reconstructions.every=2", "callback.reconstructions.count=8"]
    train(
        compose_config("train", ["experiment=emoji/autoencoder", where + "autoencoder", *shared, *emoji, *STEPS, *KL, *preview])
    )
    home = runs / "quickstart"
    precompute(compose_config("precompute", [f"model={home}/autoencoder", f"out={home}/latents", *emoji]))
    drawings = ["callback.drawings.every=2", "callback.drawings.captions=[dart,kite]", "sampler.steps=2"]
    text = ["experiment=emoji/text", where + "diffusion", "data=latents", *shared, *STEPS, *UNET, *drawings]
    train(compose_config("train", text))
    return home, emoji, shared


def test_every_stage_leaves_a_whole_folder(road):
    home, _, _ = road
    for stage, files in {
        "clip": ["open_clip_config.json", "open_clip_model.safetensors", "statistics.safetensors"],
        "autoencoder": ["config.json", "model.safetensors", "previews/00000002.png"],
        "diffusion": ["config.json", "model.safetensors", "autoencoder/model.safetensors", "previews/00000002.png"],
    }.items():
        assert all((home / stage / f).is_file() for f in [*files, "config.yaml"]), stage
        assert [f.name for f in sorted((home / stage).rglob("*.ckpt"))] == ["step-00000002.ckpt", "step-00000003.ckpt"]
        assert "train/loss" in read_curves(home / stage) and not list((home / stage).rglob("*.part"))


def test_the_checkpoint_is_the_model_that_was_exported(road):
    home, _, _ = road
    exported, trained = (load_model(home / "diffusion" / part).state_dict() for part in ("", "checkpoints/step-00000003.ckpt"))
    assert all(torch.equal(exported[name], trained[name]) for name in exported)


def test_the_folder_stands_on_its_own(road, tmp_path):
    import shutil

    home, _, _ = road
    shutil.copytree(home / "diffusion", tmp_path / "elsewhere")
    for part in ("csv", "checkpoints", "previews"):
        shutil.rmtree(tmp_path / "elsewhere" / part)
    assert str(home) not in (tmp_path / "elsewhere" / "config.json").read_text()
    load_model(tmp_path / "elsewhere")


def test_latents_online_are_those_made_ahead(road):
    from ldm.build import build
    from ldm.data.shards import Shards

    home, emoji, _ = road
    data = build(compose_config("train", emoji).data)
    ahead = Shards(home / "latents" / "train", fields={"moments": "moments.npy", "caption": "txt"}, batch=8)
    autoencoder = load_autoencoder(str(home / "autoencoder"))
    online, stored = (next(iter(d.ordered("train", 8))) for d in (data, ahead))
    moments = autoencoder.encode(data.on_after_batch_transfer(online, 0)["image"])
    assert online["key"] == stored["key"] and online["caption"] == stored["caption"]
    torch.testing.assert_close(torch.cat((moments.mean, moments.std), 1), stored["moments"], atol=1e-4, rtol=1e-4)


def test_latents_from_shards_need_no_autoencoder_until_something_is_drawn(road, tmp_path):
    home, _, shared = road
    text = ["experiment=emoji/text", f"data.train={home}/latents/train", f"data.val={home}/latents/val", "data=latents"]
    cached = ["autoencoder=cached", f"autoencoder.load.path={home}/autoencoder", "callback=[checkpoint]", *shared, *STEPS, *UNET]
    folder = train(compose_config("train", [*text, *cached, "run_id=cached"]))
    assert (folder / "autoencoder.load" / "statistics.json").is_file()
    drawn = sample(compose_config("sample", [f"model={folder}", f"out={tmp_path}", "prompt=dart", "sampler.steps=2", "tile=4"]))
    assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()


@pytest.mark.parametrize("experiment", ["autoencoder_gan", "vq"])
def test_the_other_autoencoders_train_and_export(road, experiment):
    _, emoji, shared = road
    small = ["adversary.start=1", "adversary.network.width=8"] if experiment == "autoencoder_gan" else ["autoencoder.codes=16"]
    arguments = [f"experiment=emoji/{experiment}", "callback=[checkpoint,latents]", "callback.latents.every=2"]
    folder = train(compose_config("train", [*arguments, *shared, *emoji, *STEPS, *KL, *small]))
    assert load_autoencoder(str(folder)).count > 0 and (folder / "latents" / "00000002.json").is_file()
    named = "train/discriminator" if experiment == "autoencoder_gan" else "train/perplexity"
    assert named in read_curves(folder)


def test_diffusion_trains_on_pictures_too_and_resumes(road):
    _, emoji, shared = road
    arguments = [
        "experiment=emoji/text",
        *shared,
        *emoji,
        *UNET,
        "callback=[checkpoint,ema]",
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
    ]
    folder = train(compose_config("train", [*arguments, "trainer.max_steps=2"]))
    again = train(compose_config("train", [*arguments, "trainer.max_steps=3"]))
    assert folder == again and (folder / "checkpoints" / "step-00000003.ckpt").is_file()
    assert len(list(folder.glob("csv/version_*/metrics.csv"))) == 2


def test_a_picture_depends_on_its_seed_and_prompt_alone(road, tmp_path):
    home, _, _ = road
    common = [f"model={home}/diffusion", "sampler.steps=3"]
    many = sample(compose_config("sample", [*common, f"out={tmp_path}/a", "prompt=[dart,kite,yo-yo]", "batch=2", "seed=5"]))
    alone = sample(compose_config("sample", [*common, f"out={tmp_path}/b", "prompt=yo-yo", "seed=7"]))
    torch.testing.assert_close(many[2:], alone, atol=1e-4, rtol=0)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
        "grid.png",
        "request.json",
    ]
    assert Image.open(tmp_path / "a" / "00000.png").size == (32, 32)
    request = json.loads((tmp_path / "a" / "request.json").read_text())
    assert request["seeds"] == [5, 6, 7] and request["asked"]["caption"] == ["dart", "kite", "yo-yo"]


def captured(graph, _, **__):
    """A backend of torch.compile that runs what was captured, as it is."""
    GRAPHS.append(graph)
    return graph.forward


GRAPHS = []


@pytest.mark.parametrize("backend", [captured, pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_draws_the_same(backend, road, tmp_path, monkeypatch):
    """One graph, without a break, for all batches of a request."""
    torch._dynamo.reset()
    GRAPHS.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    asks = [f"model={road[0]}/diffusion", f"out={tmp_path}", "prompt=[dart,kite,yo-yo]", "batch=2", "sampler.steps=2"]
    plain, fast = (sample(compose_config("sample", [*asks, f"compile={switch}"])) for switch in ("false", "true"))
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=0)
    assert len(GRAPHS) == (backend is captured)


def test_prompts_from_a_file_negative_and_larger(road, tmp_path):
    home, _, _ = road
    (home / "prompts.txt").write_text("a café, at night\n\nlion's [mane] = {0..9}\n", encoding="utf-8")
    common = [f"model={home}/diffusion", "sampler.steps=2", f"prompts={home}/prompts.txt", "resolution=64"]
    plain = sample(compose_config("sample", [*common, f"out={tmp_path}/a"]))
    negative = sample(compose_config("sample", [*common, f"out={tmp_path}/b", "negative=blurry"]))
    assert plain.shape == (2, 3, 64, 64) and not torch.equal(plain, negative)
    begun = [f"init={tmp_path}/a/00000.png", f"mask={tmp_path}/a/00001.png", f"out={home}/drawn"]
    assert sample(compose_config("sample", [*common, *begun])).shape == plain.shape
    assert (home / "drawn" / "grid.png").is_file()


def test_what_cannot_be_asked_is_said(road, tmp_path):
    home, _, _ = road
    with pytest.raises(ValueError, match=r"asked by prompt='\.\.\.'; found nothing"):
        sample(compose_config("sample", [f"model={home}/diffusion", f"out={tmp_path}"]))
    with pytest.raises(ValueError, match=r"found \['caption', 'label'\]"):
        sample(compose_config("sample", [f"model={home}/diffusion", f"out={tmp_path}", "prompt=x", "ask.label=[3]"]))
    with pytest.raises(ValueError, match=r"30x30 pixels.*multiples of 4"):
        sample(compose_config("sample", [f"model={home}/diffusion", f"out={tmp_path}", "prompt=x", "resolution=30"]))


def test_evaluate_writes_numbers_and_their_protocol(road, tmp_path):
    home, emoji, _ = road
    runs = f"runs={home.parent}"
    where = [f"out={tmp_path / ODD}", f"cache={home}/references"]
    arguments = [f"model={home}/diffusion", *emoji, *where, "count=5", "batch=2", "sampler.steps=2", runs]
    numbers, pictures, _ = evaluate(compose_config("evaluate", arguments))
    told = json.loads((tmp_path / ODD / "metrics.json").read_text())
    assert {"reconstruction_psnr", "text_match_top1", "clip_retrieval_top1", "clip_score", "fd_clip"} <= set(numbers)
    assert len(pictures["drawing"]) == 5
    assert {k: told[k]["value"] for k in numbers} == numbers
    protocol = told["text_match_top1"]["protocol"]
    assert protocol["sampler"]["steps"] == 2 and protocol["count"] == 5 and protocol["reference"]["shards"]
    with pytest.raises(ValueError, match="use count="):
        evaluate(compose_config("evaluate", [*arguments, "count=5000"]))


def test_what_is_not_there_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python train\.py experiment=emoji/autoencoder (runs=\S+ )?run_id="):
        load_autoencoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor a good"):
        load_model(tmp_path)
    for experiment in ("emoji/autoencoder", "emoji/text"):
        with pytest.raises(Exception, match=r"python train\.py experiment=emoji/"):
            train(compose_config("train", [f"experiment={experiment}", f"runs={tmp_path}", f"data.root={tmp_path}"]))


def test_latents_without_statistics_are_refused_and_the_advice_measures_them(road, tmp_path):
    from ldm.files.folder import load_tensors, save_model

    home, emoji, shared = road
    weights = load_tensors(home / "autoencoder" / "model.safetensors")
    config = json.loads((home / "autoencoder" / "config.json").read_text())
    save_model(weights | {"count": torch.zeros((), dtype=torch.int64)}, config, tmp_path)
    advice = ["training=autoencoding", "training.perceptual=null", f"model.init={tmp_path}", "trainer.max_steps=0"]
    with pytest.raises(ValueError, match=f"has no latent statistics.*python train.py {' '.join(advice)}"):
        load_autoencoder(str(tmp_path))
    sizes = ["autoencoder=kl", "autoencoder.res_blocks=1", *KL]
    measured = load_tensors(train(compose_config("train", [*advice, *sizes, *shared, *emoji])) / "model.safetensors")
    assert all(torch.equal(measured[name], weight) for name, weight in weights.items())


def test_the_report_needs_nothing_from_elsewhere(tmp_path):
    from base64 import b64decode
    from io import BytesIO

    from torchvision.transforms.functional import pil_to_tensor

    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    text = page("<b>&", "lead", [("walls", wall(images / 127.5 - 1, ['<b>"', "b", "c"], [True, False, True])), ("empty", "")])
    assert "http" not in text and "<b>&</" not in text and "&lt;b&gt;&amp;" in text and "empty" not in text
    data = picture(images[0] / 127.5 - 1).split("base64,")[1].split('"')[0]
    assert torch.equal(pil_to_tensor(Image.open(BytesIO(b64decode(data)))), images[0])
    for version, rows in enumerate(["step,train/loss\n1,3.0\n2,2.0\n", "step,train/loss,val/loss\n2,1.5,\n3,,0.5\n"]):
        log = tmp_path / "csv" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text(rows)
    assert read_curves(tmp_path) == {"train/loss": ([1.0, 2.0], [3.0, 1.5]), "val/loss": ([3.0], [0.5])}
