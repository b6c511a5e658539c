"""LPIPS against torchmetrics' on the same random network, and files that are not what they should be."""

import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import alexnet, squeezenet1_1, vgg16

from ldm.errors import Unreachable
from ldm.loss.lpips import LPIPS
from ldm.tower.lpips import ENDS, LEAST


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An AlexNet of random weights, as torchvision saves it."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    net = alexnet()
    torch.save({k: v for k, v in net.state_dict().items() if k.startswith("features")}, file)
    return file


def test_it_is_torchmetrics_on_the_same_network(weights):
    mine, theirs = LPIPS("alex", str(weights)), _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    own = {f"{i}.{name}": value for i, layer in enumerate(mine.distance.features) for name, value in layer.state_dict().items()}
    for part in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5):
        part.load_state_dict({k: v for k, v in own.items() if k.split(".")[0] in dict(part.named_children())})
    images, targets = torch.rand(2, 3, 4, 64, 64).mul(2).sub(1).transpose(1, 2)
    wanted = theirs(images, targets).mean()
    torch.testing.assert_close(mine(images, targets), wanted, atol=1e-6, rtol=1e-5)
    assert wanted > 0 and mine(images, images).item() == 0


def test_gradients_reach_the_picture_and_nothing_else(weights):
    """A distance computed under no_grad trains nothing: the commonest defect of public trainers."""
    net = LPIPS("alex", str(weights)).train()
    images, targets = torch.rand(2, 3, 64, 64, requires_grad=True), torch.rand(2, 3, 64, 64, requires_grad=True)
    net(images, targets).backward()
    assert images.grad.abs().max() > 0 and targets.grad is None
    assert not net.distance.training and not any(p.requires_grad for p in net.parameters())
    assert all((head >= 0).all() for head in net.distance.heads)


def test_half_precision_neither_overflows_nor_vanishes(weights):
    """Features beyond 256 have squares that float16 does not hold; squared differences can be too small for it."""
    net = LPIPS("alex", str(weights))
    net.distance.features[0].weight.data *= 1000
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    targets = images + 0.02 * torch.randn(1, 3, 64, 64)
    wanted = net(images, targets)
    with torch.autocast("cpu", torch.float16):
        told = net(images, targets)
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, wanted, rtol=0.05, atol=0)


def test_files_that_are_no_vgg_name_themselves(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"loss\.weights=nowhere"):
        LPIPS("vgg", "nowhere")
    with pytest.raises(ValueError, match=r"does not hold torchvision's vgg16: .*vgg16-397923af\.pth"):
        LPIPS("vgg", str(weights))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"loss\.weights=.*text\.pth does not load as plain tensors \(UnpicklingError\)"):
        LPIPS("vgg", str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list and no tensors by name"):
        LPIPS("vgg", str(tmp_path / "list.pth"))
    with pytest.raises(ValueError, match=r"loss\.net=vgg19: there are vgg, alex, squeeze"):
        LPIPS("vgg19")


def test_it_takes_any_picture_that_its_network_leaves_something_of(weights):
    net, images = LPIPS("alex", str(weights)), torch.zeros(1, 3, 40, 31)
    assert net(images, images) == 0
    with pytest.raises(ValueError, match=r"40x30 pixels are too small for loss\.net=alex, which needs 31; .*data\.size"):
        net(images[..., 1:], images[..., 1:])
    with torch.device("meta"):
        for name, make in {"vgg": vgg16, "squeeze": squeezenet1_1}.items():
            least, side = make().features[: ENDS[name][-1] + 1], LEAST[name]
            assert least(torch.zeros(1, 3, side, side)).numel() > 0
            with pytest.raises(RuntimeError):
                least(torch.zeros(1, 3, side, side - 1))


def test_without_a_network_it_says_what_to_fetch(monkeypatch, tmp_path):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(Unreachable, match=r"could not be downloaded.*loss\.weights=FILE\. Or .*loss=features"):
        LPIPS("alex")
