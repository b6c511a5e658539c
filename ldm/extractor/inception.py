"""The Inception-v3 of FID: Google's 2015 network with 1,008 classes, not torchvision's.

It is the network of Heusel et al. (https://arxiv.org/abs/1706.08500) as pytorch-fid ported it: average pooling leaves padding
out, the last block has maximum pooling, and pictures are resized as in TensorFlow 1. torch-fidelity, pytorch-fid and ADM's
evaluator use the same weights; torchmetrics' FID resizes with antialiasing, and gives other numbers.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torchvision.models.inception import Inception3, InceptionA, InceptionC, InceptionE

from ldm.extractor._weights import frozen, read_weights
from ldm.files.picture import to_bytes
from ldm.measure import Rows

PUBLISHED = "fid"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299


class Inception:
    """Pictures of any size -> `features` (B, 2048) before the classifier, and `logits` (B, 1008) without its bias.

    `weights` is a local file, or `fid`, which downloads the published ones. A file must have `sha256`; null takes any file.
    """

    statistics = "inception"  # of reference batches in .npz files, ADM's and pytorch-fid's

    def __init__(self, weights: str = PUBLISHED, sha256: str | None = SHA256) -> None:
        self.net, self.protocol = _load(weights, sha256)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Rows:
        """images: (B, 3, h, w) in [-1, 1], which are rounded to 8 bits -> features: (B, 2048), logits: (B, 1008)."""
        x = resize_tensorflow1(to_bytes(images).float(), SIDE, SIDE).sub(128).div(128)
        features = self.net.to(images.device)(x)
        return {"features": features, "logits": features @ self.logits.T.to(features)}

    @property
    def logits(self) -> Tensor:
        """The classifier's weights, (1008, 2048)."""
        return self.net.classifier.weight


def resize_tensorflow1(images: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) -> (B, C, height, width): bilinear as in TensorFlow 1, pixel i from i * h / height, no antialiasing."""
    return _interpolate(_interpolate(images, width, dim=3), height, dim=2)


def _interpolate(x: Tensor, size: int, dim: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float32, device=x.device) * (x.shape[dim] / size)
    low = place.long()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    shape = [1] * x.ndim
    shape[dim] = size
    first = x.index_select(dim, low)
    return first + (x.index_select(dim, high) - first) * (place - low).view(shape)


def inception() -> nn.Module:
    """-> the network with random weights; its parameters have the names of pytorch-fid's file."""
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name, channels in {"Mixed_5b": 32, "Mixed_5c": 64, "Mixed_5d": 64}.items():
        setattr(net, name, _A(getattr(net, name).branch1x1.conv.in_channels, pool_features=channels))
    for name, channels in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}.items():
        setattr(net, name, _C(768, channels_7x7=channels))
    net.Mixed_7b, net.Mixed_7c = _E(1280, _mean), _E(2048, lambda x: max_pool2d(x, 3, 1, 1))
    return net


def _mean(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _A(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        narrow, wide = self.branch5x5_2(self.branch5x5_1(x)), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), narrow, wide, self.branch_pool(_mean(x))]


class _C(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(_mean(x))]


class _E(InceptionE):
    def __init__(self, channels: int, pool: Any) -> None:
        super().__init__(channels)
        self.pool = pool

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        single = torch.cat((self.branch3x3_2a(single), self.branch3x3_2b(single)), 1)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = torch.cat((self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)), 1)
        return [self.branch1x1(x), single, double, self.branch_pool(self.pool(x))]


@cache
def _load(weights: str, sha256: str | None) -> tuple[nn.Module, dict[str, Any]]:
    net = inception()
    net.load_state_dict(read_weights(weights, PUBLISHED, URL, sha256))
    protocol = frozen(net, "inception-v3 2015-12-05", "bilinear to 299, TensorFlow 1, no antialiasing")
    net.classifier, net.fc = net.fc, nn.Identity()
    return net, protocol
