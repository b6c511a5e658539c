"""Instance pictures with their captions, and class pictures in a fixed share of every batch; what does not go is named."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.dreambooth import TEMPLATES, DreamBooth
from ldm.data.usual import resolved, usual_of
from ldm.denoiser import Denoiser, Timestep
from ldm.errors import NotFound, Refusal
from ldm.files.folder import write_json, write_text
from ldm.objective.regression import Regression
from ldm.objective.time import Uniform
from ldm.objective.weight import MinSNR, Plain
from ldm.prediction import Noise
from ldm.schedule import ScaledLinear
from ldm.types import Cond, Draw

FIELDS = {"size": 8, "batch": 6}


def pictures(folder, count, caption=None, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((12, 10, 3), first + i, np.uint8)).save(folder / f"{i}.png")
        if caption is not None:
            write_text(caption, folder / f"{i}.txt")
    return folder


@pytest.fixture
def folders(tmp_path):
    write_json({"count": 5, "model": "runs/base", "sha256": "a" * 64}, tmp_path / "prior" / "prior.json")
    pictures(tmp_path / "prior" / "pictures", 5, "a dog", 100)
    return pictures(tmp_path / "dog", 3), tmp_path / "prior"


def batches(data, count):
    data.prepare_data()
    data.setup()
    found = iter(data.train_dataloader())
    return [next(found) for _ in range(count)]


@pytest.mark.parametrize("weight, instances", [(None, 3), (0.5, 4), (2.0, 2)])
def test_each_batch_has_its_share(folders, weight, instances):
    """And of each kind none comes again before all have come."""
    dog, prior = folders
    data = DreamBooth(dog, "a photo of sks dog", prior=prior, prior_weight=weight, **FIELDS)
    seen = {"a photo of sks dog": [], "a dog": []}
    for batch in batches(data, 10):
        captions = batch["caption"]
        assert captions.count("a photo of sks dog") == instances and len(captions) == 6
        for caption, image in zip(captions, batch["image"]):
            seen[caption].append(int(image.float().mean()))
    for caption, values in (("a photo of sks dog", range(3)), ("a dog", range(100, 105))):
        counts = [seen[caption].count(value) for value in values]
        assert sum(counts) == len(seen[caption]) and max(counts) - min(counts) <= 1


def test_a_share_that_does_not_divide_is_kept_over_batches(folders):
    dog, prior = folders
    data = DreamBooth(dog, "sks", prior=prior, size=8, batch=5)
    assert sum(batch["caption"].count("sks") for batch in batches(data, 8)) == 20


def test_captions_of_templates_and_of_files(folders, tmp_path):
    dog, _ = folders
    assert len(TEMPLATES["object"]) == 27 == len(set(TEMPLATES["object"])) and len(TEMPLATES["style"]) == 19
    data = DreamBooth(dog, "<fox>", templates="object", **FIELDS)
    captions = batches(data, 1) and data.train_set.captions()
    assert len(captions) == 81 and captions[:2] == ["a photo of a <fox>", "a rendering of a <fox>"]
    own = DreamBooth(pictures(tmp_path / "own", 6, "my dog"), **FIELDS)
    assert batches(own, 1)[0]["caption"] == ["my dog"] * 6
    both = DreamBooth(tmp_path / "own", "<fox>", templates=["{} and {}"], **FIELDS)
    assert batches(both, 1)[0]["caption"] == ["<fox> and <fox>"] * 6


def test_what_it_was_trained_on_is_kept(folders):
    dog, prior = folders
    node = {"_target_": "ldm.data.dreambooth.DreamBooth", "pictures": str(dog), "prompt": "sks", "prior": str(prior), **FIELDS}
    usual = usual_of({**node, "fields": {"image": "jpg", "caption": "txt"}})
    assert usual["resolution"] == [8, 8] and usual["data"]["prior"] == str(prior)
    said = {"_target_": "ldm.data.usual.Usual", "train": "elsewhere", "fields": {}}
    assert resolved(said, usual)["_target_"] == "ldm.data.shards.Shards" and "prior" not in resolved(said, usual)


def test_what_does_not_go_is_named(folders, tmp_path):
    dog, prior = folders

    def refused(message, *words, **settings):
        with pytest.raises(Refusal, match=message):
            batches(DreamBooth(*words, **{**FIELDS, **settings}), 1)

    refused(r"data\.prompt: 0\.png has no caption beside it", dog)
    refused(r"data\.templates=things: there are object, style", dog, "x", templates="things")
    refused(r"data\.templates want data\.prompt", dog, templates="object")
    refused(r"'a dog' has no \{\}", dog, "x", templates=["a dog"])
    refused(r"prior_weight=1\.0 without data\.prior: class pictures are drawn by ldm prior", dog, "x", prior_weight=1.0)
    refused(r"batch=1 has no room for instance and prior \(data\.batch=2\)", dog, "x", prior=prior, batch=1)
    refused(r"batch=2 has no room .* \(data\.batch=3\)", dog, "x", prior=prior, batch=2, prior_weight=0.5)
    refused(r"wanted more than 0", dog, "x", prior=prior, prior_weight=0)
    refused(r"2 of 2 pictures have no caption, such as 0\.png", dog, "x", prior=pictures(tmp_path / "silent", 2))
    with pytest.raises(NotFound, match=r"data\.pictures=|data\.train="):
        batches(DreamBooth(tmp_path / "none", "x", **FIELDS), 1)
    (prior / "pictures" / "4.png").unlink()
    refused(r"holds 4 of the 5 class pictures that were asked of runs/base", dog, "x", prior=prior)


def test_class_pictures_of_another_model_are_named(folders):
    dog, prior = folders
    data = DreamBooth(dog, "x", prior=prior, **FIELDS)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(began="b" * 64))
    with pytest.raises(Refusal, match=r"was drawn by runs/base with sha256 aaaaaaaaaaaa, and model\.init is bbbbbbbbbbbb"):
        data.setup()


@pytest.mark.parametrize("weight", [Plain(), MinSNR()])
@pytest.mark.parametrize("prior_weight, instances", [(1.0, 3), (0.5, 4)])
def test_the_loss_is_the_papers_two_terms(weight, prior_weight, instances):
    """(1 + w) x ours = L_instance + w L_prior, as diffusers' script sums them; with min-SNR of noise, min(SNR, 5) / SNR each."""
    net = torch.nn.Conv2d(4, 4, 3, padding=1)
    denoiser = Denoiser(lambda x, level, cond: net(x), ScaledLinear(), Noise(), Timestep(1000), unit_input=False)
    x, draw = torch.randn(6, 4, 8, 8), Draw(0, torch.arange(6), 6)
    objective = Regression(time=Uniform(), weight=weight)
    with torch.no_grad():
        ours = objective(SimpleNamespace(denoiser=denoiser), {}, x, Cond(), draw)["loss"]
        t = objective.time(draw.stratified("time"), denoiser.schedule)
        noise = draw.normal("noise", x.shape[1:])
        alpha, sigma = (s.reshape(-1, 1, 1, 1) for s in denoiser.schedule(t))
        error = (net(alpha * x + sigma * noise) - noise).square().mean((1, 2, 3))
    snr = (alpha / sigma).square().flatten()
    error = error * (snr.clamp(max=5) / snr if isinstance(weight, MinSNR) else 1)
    theirs = error[:instances].mean() + prior_weight * error[instances:].mean()
    assert abs((1 + prior_weight) * ours - theirs) < 1e-6 * theirs
