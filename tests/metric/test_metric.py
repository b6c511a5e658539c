"""Metrics against peers and closed forms, with random weights made on the spot."""

import numpy as np
import open_clip
import pytest
import scipy.linalg
import torch
import torch_fidelity
from PIL import Image
from torch import nn
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import mobilenet_v3_small, squeezenet1_1

from ldm.extractor.clip import Clip
from ldm.extractor.inception import Inception, _load, inception, resize_tensorflow1
from ldm.extractor.timm import Timm
from ldm.extractor.torchvision import Torchvision
from ldm.files.picture import to_bytes
from ldm.files.weights import weights_hash
from ldm.measure import Estimate
from ldm.metric.class_accuracy import ClassAccuracy
from ldm.metric.clip_retrieval import ClipRetrieval
from ldm.metric.clip_score import ClipScore
from ldm.metric.frechet import Frechet, frechet, moments
from ldm.metric.inception_score import InceptionScore
from ldm.metric.kernel import Kernel, discrepancy
from ldm.metric.lpips import Lpips
from ldm.metric.nearest import Nearest
from ldm.metric.precision_recall import PrecisionRecall
from ldm.metric.reconstruction import Reconstruction


def pictures(count, size=64, seed=0, contrast=1.0):
    """Smooth random pictures on the grid of 8 bits."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * contrast
    smooth = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)
    return to_bytes(smooth).float() / 127.5 - 1


class Reals:
    """A reference of given rows."""

    def __init__(self, rows):
        self.rows = lambda: rows

    def kept(self, name, make):
        return make(self.rows())


class Stub:
    """An extractor whose features are the pictures' pixels."""

    def __init__(self, **protocol):
        self.protocol = {"extractor": "pixels", **protocol}

    def __call__(self, images):
        return {"features": images.flatten(1)}


def features(rows):
    return {"features": rows, "number": torch.arange(len(rows))}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random Inception weights that keep their signal up to the last layer."""
    torch.manual_seed(0)
    net = inception()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    usual = Inception(str(path), sha256=None)(pictures(2))["features"].mean(0)
    rows = 2 * torch.randn(1008, 2048)  # classes tell pictures apart: what all have in common says nothing
    net.fc.weight.data = rows - torch.outer(rows @ usual, usual) / usual.square().sum()
    _load.cache_clear()
    torch.save(net.state_dict(), path)
    return str(path)


class Files(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = to_bytes(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fid_kid_is_and_prc_are_torch_fidelitys(whole, weights):
    """Its FID takes the eigenvalues of 2,048 x 2,048 numbers: in the quick suite those of the features turned into their span."""
    drawn, real = pictures(4, 48, seed=1), pictures(6, 64, seed=2, contrast=0.7)
    common = {"input1": Files(drawn), "input2": Files(real), "cuda": False, "verbose": False, "cache": False, "batch_size": 7}
    common |= {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": weights, "save_cpu_ram": True}
    peer = torch_fidelity.calculate_metrics(
        isc=True, fid=whole, kid=True, prc=True, kid_subset_size=4, kid_subsets=20, isc_splits=2, prc_neighborhood=2, **common
    )
    extractor = Inception(weights, sha256=None)
    own, reals = extractor(drawn), Reals(features(extractor(real)["features"]))
    metrics = (
        Frechet(lambda: extractor),
        Kernel(lambda: extractor, subsets=20, size=4),
        InceptionScore(lambda: extractor, splits=2),
        PrecisionRecall(lambda: extractor, k=2),
    )
    found = {name: e.value for m in metrics for name, e in m.compute(own, reals).items()}
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    if not whole:
        span = torch.linalg.qr(torch.cat((own["features"], reals.rows()["features"])).double().T).Q
        turned = [(f.double() @ span).numpy() for f in (own["features"], reals.rows()["features"])]
        theirs = fid_statistics_to_metric(*({"mu": f.mean(0), "sigma": np.cov(f, rowvar=False)} for f in turned), verbose=False)
        peer |= theirs
    assert peer["frechet_inception_distance"] > 1 and 1.01 < peer["inception_score_mean"]
    for name, theirs in names.items():
        assert found[name] == pytest.approx(peer[theirs], rel=1e-3), name


def test_torchmetrics_antialiases_by_default_and_then_has_another_fid(weights):
    """The trap: its default is not the FID of papers; with antialias=False it is."""
    images = pictures(2, 400)
    ours = Inception(weights, sha256=None)(images)["features"]
    peers = {
        antialias: FrechetInceptionDistance(feature_extractor_weights_path=weights, antialias=antialias) for antialias in (0, 1)
    }
    theirs = {antialias: peer.inception(to_bytes(images)) for antialias, peer in peers.items()}
    torch.testing.assert_close(theirs[False], ours, rtol=1e-4, atol=1e-5)
    assert (theirs[True] - ours).abs().max() > 100 * (theirs[False] - ours).abs().max() + 1e-3


def test_tensorflow_1_takes_pixel_i_from_i_times_the_scale():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    up = resize_tensorflow1(ramp, 8, 16)[0, 0, 0]
    torch.testing.assert_close(up, torch.cat((torch.arange(0, 7.5, 0.5), torch.tensor([7.0]))))
    assert torch.equal(resize_tensorflow1(ramp, 8, 4)[0, 0, 0], torch.tensor([0.0, 2.0, 4.0, 6.0]))


def test_only_the_published_inception_is_taken_for_fids(weights, tmp_path):
    with pytest.raises(ValueError, match=r"sha256 \w{64}, not 6726825d.*extractor\.sha256=null"):
        Inception(weights)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Inception(str(tmp_path / "none.pth"))
    assert Inception(weights, sha256=None).protocol["sha256"] != weights_hash(inception())


def test_frechet_of_normals_has_its_closed_form():
    """Diagonal covariances: sum (m1 - m2)^2 + (s1 - s2)^2; full ones: scipy's square root."""
    mean, std = torch.randn(2, 6).double(), torch.rand(2, 6).double() + 0.1
    wanted = ((mean[0] - mean[1]).square() + (std[0] - std[1]).square()).sum().item()
    assert frechet(mean[0], std[0].square().diag(), mean[1], std[1].square().diag()) == pytest.approx(wanted, rel=1e-9)
    a, b = (moments({"features": torch.randn(40, 6) @ torch.randn(6, 6)}) for _ in range(2))
    root = scipy.linalg.sqrtm(a["covariance"].numpy() @ b["covariance"].numpy()).real
    wanted = (a["mean"] - b["mean"]).square().sum() + (a["covariance"] + b["covariance"]).trace() - 2 * np.trace(root)
    assert frechet(*a.values(), *b.values()) == pytest.approx(wanted.item(), rel=1e-7)
    few = moments({"features": torch.randn(5, 64)})
    assert frechet(*few.values(), *few.values()) == pytest.approx(0, abs=1e-5)


def test_frechet_says_what_a_number_is_worth_and_refuses_nan():
    metric = Frechet(Stub)
    rows, real = features(torch.randn(10, 12)), features(torch.randn(30, 12))
    assert "rank 9" in metric.compute(rows, Reals(real))["fid"].note
    assert metric.compute(real, Reals(real))["fid"].note is None
    broken = features(torch.randn(30, 12).index_fill(0, torch.tensor(3), float("nan")))
    with pytest.raises(ValueError, match=r"NaN or infinity among the pictures' features.*diverged"):
        metric.compute(broken, Reals(real))
    with pytest.raises(ValueError, match="12 wide, the reference's 5: its statistics are of another extractor"):
        metric.compute(real, Reals(features(torch.randn(30, 5))))
    with pytest.raises(ValueError, match="at least 2 pictures"):
        metric.compute(features(torch.randn(1, 12)), Reals(real))


def test_kernel_distance_is_unbiased_and_the_peers():
    """The same distribution: 0 on average, with either sign; subsets as torch-fidelity draws them."""
    same = [discrepancy(torch.randn(20, 4).double(), torch.randn(20, 4).double()) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5 and min(same) < 0 < max(same)
    own, real = torch.randn(60, 16), torch.randn(50, 16) + 0.3
    found = Kernel(Stub, subsets=10, size=30).compute(features(own), Reals(features(real)))
    peer = kid_features_to_metric(own, real, kid_subsets=10, kid_subset_size=30, verbose=False)
    assert found["kid"].value == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-4)
    assert "subsets of 50" in Kernel(Stub, subsets=1).compute(features(own), Reals(features(real)))["kid"].note


def test_precision_and_recall_by_chunks_are_the_peers(monkeypatch):
    monkeypatch.setattr("ldm.metric._neighbours.CHUNK", 7)
    own, real = torch.randn(60, 3) * 0.5, torch.randn(50, 3)
    found = PrecisionRecall(Stub).compute(features(own), Reals(features(real)))
    peer = prc_features_to_metric(own, real, verbose=False)
    assert {n: found[n].value for n in found} == pytest.approx({n: peer[n] for n in found})
    assert found["precision"].value > found["recall"].value and "60 drawings against 50" in found["recall"].note


def test_inception_score_of_sure_and_even_classes_is_their_number():
    logits = 100 * torch.eye(4).repeat(50, 1)
    found = InceptionScore(Stub, splits=1).compute({"logits": logits}, None)
    assert found["inception_score"].value == pytest.approx(4, rel=1e-6) and "variety" in found["inception_score"].note
    with pytest.raises(ValueError, match="class logits"):
        InceptionScore(Stub).compute({"features": logits}, None)


def test_clip_score_is_the_plain_open_clip_formula(clip_folder):
    name = f"local-dir:{clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name, context_length=12)
    images, captions = pictures(5, 50), ["kite", "dart", "a red kite", "yo-yo", "trophy"]
    metric = ClipScore(name)
    found = metric.compute(metric.look(images, {"caption": captions}), None)["clip_score"]
    with torch.no_grad():
        files = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in to_bytes(images)]
        seen = model.eval().encode_image(torch.stack([preprocess(f) for f in files]))
        said = model.encode_text(tokenizer(captions))
    wanted = 100 * nn.functional.cosine_similarity(seen, said).clamp(min=0)
    torch.testing.assert_close(metric.scores, wanted, rtol=1e-5, atol=1e-5)
    assert found.value == pytest.approx(wanted.mean().item()) and found.error == pytest.approx(wanted.std().item() / 5**0.5)
    with pytest.raises(ValueError, match="compares pictures with captions"):
        metric.look(images, {"label": torch.zeros(5)})


def test_retrieval_counts_a_caption_among_its_rivals(clip_folder):
    metric = ClipRetrieval(f"local-dir:{clip_folder}")
    text = torch.eye(6)
    image = text[[0, 1, 2, 3, 5, 4]] + 0.1
    assert metric.compute({"image": image, "text": text}, None)["clip_retrieval_top1"].value == pytest.approx(4 / 6)
    twins = text[[0, 0, 1, 1, 2, 2]]  # an equal caption is no rival
    assert metric.compute({"image": twins, "text": twins}, None)["clip_retrieval_top1"].value == 1
    metric.others = 1
    drawn = [metric.compute({"image": image.roll(1, 0), "text": text}, None)["clip_retrieval_top1"].value for _ in range(2)]
    assert drawn[0] == drawn[1] < 1
    metric.others = 6
    with pytest.raises(ValueError, match="only 5 others"):
        metric.compute({"image": image, "text": text}, None)


def test_psnr_and_ssim_of_pictures():
    images = pictures(3, 32)
    noisy = (images + 0.1 * torch.randn(3, 3, 32, 32)).clamp(-1, 1)
    metric = Reconstruction()
    rows = metric.look(noisy, {"image": images})
    for psnr, one, other in zip(rows["psnr"], noisy, images):
        assert psnr.item() == pytest.approx(peak_signal_noise_ratio(one, other, data_range=2.0).item(), rel=1e-5)
    assert metric.look(images, {"image": images})["ssim"].tolist() == pytest.approx([1] * 3) and (rows["ssim"] < 1).all()
    assert set(metric.compute(rows, None)) == {"reconstruction_psnr", "reconstruction_ssim"}
    with pytest.raises(ValueError, match=r"32, 32.*16, 16"):
        metric.look(images, {"image": images[..., :16, :16]})


@pytest.mark.parametrize("net, make", [("squeeze", squeezenet1_1)])
def test_lpips_is_the_packages_with_the_same_backbone(net, make, tmp_path):
    backbone = make(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    peer = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    for own, theirs in zip(peer.net.parameters(), backbone.features.parameters()):
        own.data.copy_(theirs)
    one, other = pictures(2), pictures(2, seed=1)
    rows = Lpips(net, str(tmp_path / "backbone.pth")).look(one, {"image": other})
    torch.testing.assert_close(rows["lpips"], peer(one, other).flatten())
    assert Lpips(net, str(tmp_path / "backbone.pth")).look(one, {"image": one})["lpips"].abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"metric\.lpips\.net=resnet: there are vgg, alex"):
        Lpips("resnet", "x")


def test_class_accuracy_finds_separate_classes_and_knows_chance():
    torch.manual_seed(0)
    metric, centres = ClassAccuracy(Stub), 4 * torch.eye(3, 8)
    label = torch.arange(90) % 3
    real = {"features": centres[label] + torch.randn(90, 8), "label": label}
    asked = torch.arange(30) % 3
    right = metric.compute({"features": centres[asked] + torch.randn(30, 8), "label": asked}, Reals(real))
    shuffled = metric.compute({"features": centres[asked.roll(1)] + torch.randn(30, 8), "label": asked}, Reals(real))
    assert right["class_accuracy"].value > 0.9 and right["class_accuracy_real"].value > 0.9
    assert shuffled["class_accuracy"].value < 0.1 and metric.right.shape == (30,)
    noise = metric.compute({"features": torch.randn(30, 8), "label": asked}, Reals(real | {"features": torch.randn(90, 8)}))
    assert noise["class_accuracy_real"].value < 0.6  # left out of its own fit: near chance, not near 1
    with pytest.raises(ValueError, match=r"data\.fields\.label=cls"):
        metric.look(pictures(1), {"caption": ["x"]})


def test_left_out_of_the_fit_means_fitted_without_it():
    """The closed form against fits without each picture."""
    x, label = torch.randn(12, 3).double(), torch.arange(12) % 2
    metric = ClassAccuracy(Stub, ridge=0.0)
    closed = metric.compute({"features": x, "label": label}, Reals({"features": x, "label": label}))["class_accuracy_real"].value
    hits = []
    for i in range(12):
        kept = torch.arange(12) != i
        ones = torch.cat((x, torch.ones(12, 1)), 1)
        fit = torch.linalg.lstsq(ones[kept], nn.functional.one_hot(label)[kept].double()).solution
        hits.append((ones[i] @ fit).argmax().item() == label[i].item())
    assert closed == pytest.approx(np.mean(hits))


def test_copies_are_not_authentic_and_their_originals_are_found():
    real = torch.randn(40, 16)
    metric = Nearest(Stub)
    copied = metric.compute(features(real[[7, 3, 11]]), Reals(features(real)))
    assert metric.number.tolist() == [7, 3, 11] and copied["authenticity"].value == 0
    assert copied["nearest_similarity"].value == pytest.approx(1)
    shown = metric.show(lambda n: torch.tensor(n).view(-1, 1, 1, 1).float(), lambda n: torch.tensor(n).view(-1, 1, 1, 1).float())
    assert {(a, b) for a, b in shown.flatten().view(2, 3).T.int().tolist()} == {(0, 7), (1, 3), (2, 11)}
    new = metric.compute(features(torch.randn(200, 16)), Reals(features(torch.randn(200, 16))))["authenticity"].value
    assert 0.3 < new < 0.7


def test_clip_timm_and_torchvision_see_what_their_libraries_see(clip_folder, tmp_path):
    import timm

    images = pictures(2, 40)
    files = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in to_bytes(images)]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    net = timm.create_model("test_vit", num_classes=10)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    torch.save(mobilenet_v3_small(weights=None).state_dict(), tmp_path / "mobilenet.pth")
    extractors = (
        Clip(f"local-dir:{clip_folder}"),
        Timm("test_vit", str(tmp_path / "vit.pth")),
        Torchvision("mobilenet_v3_small", "flatten", str(tmp_path / "mobilenet.pth")),
    )
    with torch.no_grad():
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
        vit = net.eval().forward_head(net.forward_features(torch.stack([transform(f) for f in files])), pre_logits=True)
        wanted = (model.eval().encode_image(torch.stack([preprocess(f) for f in files])), vit, (2, 576))
    for extractor, truth in zip(extractors, wanted):
        found = extractor(images)["features"]
        assert set(extractor.protocol) - {"preprocess"} == {"extractor", "sha256", "resize"}
        if isinstance(truth, tuple):
            assert found.shape == truth and found.std() > 0
        else:
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="another network"):
        Timm("test_vit2", str(tmp_path / "vit.pth"))


def test_a_mean_has_its_standard_error():
    assert Estimate.mean(torch.tensor([1.0, 3.0])) == Estimate(2.0, pytest.approx(1.0))
    assert Estimate.mean(torch.tensor([True])) == Estimate(1.0, None)
