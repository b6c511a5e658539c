"""LPIPS: perceptual distance in the features of a VGG or AlexNet trained on ImageNet, weighed by people's judgements."""

from pathlib import Path
from urllib.error import URLError

import torch
import torchmetrics.functional.image as heads_of
from torch import Tensor, nn
from torchvision import models

from ldm.errors import NotFound, Refusal
from ldm.files.folder import load_tensors

ENDS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # the layers whose output is compared
LEAST = {"vgg": 16, "alex": 31}  # pixels a side, below which a layer has nothing left
NETWORKS = {"vgg": (models.vgg16, models.VGG16_Weights), "alex": (models.alexnet, models.AlexNet_Weights)}


class LPIPS(nn.Module):
    """https://arxiv.org/abs/1801.03924, equation 1, version 0.1: the trained heads are those that torchmetrics carries.

    `net` is vgg (as in Latent Diffusion's loss) or alex (as in most tables). `weights` is a local file of torchvision's
    vgg16 or alexnet, .pth or .safetensors; None downloads it by torchvision, which checks its hash.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str = "vgg", weights: str | None = None) -> None:
        super().__init__()
        if net not in ENDS:
            raise Refusal(f"loss.net={net}: there are {', '.join(ENDS)}.")
        self.net, self.ends = net, ENDS[net]
        self.features = load_features(net, weights)[: self.ends[-1] + 1]
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        file = Path(heads_of.__file__).parent / "lpips_models" / f"{net}.pth"
        heads = torch.load(file, map_location="cpu", weights_only=True)
        self.heads = nn.ParameterList([heads[f"lin{i}.model.1.weight"] for i in range(len(self.ends))])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Both (B, 3, h, w) in [-1, 1] -> (), at least 0. Gradients reach `images`; the networks stay as they are.

        Raises:
            Refusal: the pictures are too small for the network.
        """
        height, width = images.shape[2:]
        if min(height, width) < LEAST[self.net]:
            raise Refusal(
                f"Pictures of {height}x{width} pixels are too small for loss.net={self.net}, which needs {LEAST[self.net]}; "
                "train on larger ones (data.size=...), or with loss=features."
            )
        with torch.no_grad():
            wanted = self.seen(targets)
        apart = [(a - b).square() for a, b in zip(self.seen(images), wanted)]
        with torch.autocast(images.device.type, enabled=False):
            return torch.stack([nn.functional.conv2d(d, head.to(d)).mean() for d, head in zip(apart, self.heads)]).sum()

    def seen(self, images: Tensor) -> list[Tensor]:
        """(B, 3, h, w) in [-1, 1] -> features (B, D, h', w') of unit length over D, of each compared layer, in float32."""
        h, out = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.ends:
                wide = h.float()  # squares overflow in float16
                out.append(wide / (wide.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return out

    def train(self, mode: bool = True) -> "LPIPS":
        """Always in evaluation mode."""
        return super().train(False)


def load_features(net: str, weights: str | None) -> nn.Sequential:
    """The convolutional part of torchvision's network.

    Raises:
        NotFound: no such file, or nothing could be downloaded. Refusal: the file is of another network.
    """
    make, published = NETWORKS[net]
    if weights is None:
        try:
            found = published.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (URLError, OSError) as error:
            raise NotFound(
                f"torchvision's weights could not be downloaded ({error}). Fetch {published.IMAGENET1K_V1.url} elsewhere and "
                "give loss.weights=FILE, or take the distance in a local CLIP's features, loss=features."
            ) from error
    else:
        found = read_weights(Path(weights))
    with torch.device("meta"):
        features = make().features
    own, found = features.state_dict(), {k.removeprefix("features."): v for k, v in found.items() if k.startswith("features.")}
    wrong = [k for k in own.keys() | found.keys() if k not in own or k not in found or own[k].shape != found[k].shape]
    if wrong:
        raise Refusal(
            f"loss.weights={weights} does not hold torchvision's {make.__name__}: of its features, {sorted(wrong)[:3]} "
            f"are missing, unknown or of another shape ({len(wrong)} in all). The file wanted is {published.IMAGENET1K_V1.url}."
        )
    features.load_state_dict({k: v.float() for k, v in found.items()}, assign=True)
    return features


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors or .pth file, never running code from it.

    Raises:
        NotFound: no such file. Refusal: it holds something else.
    """
    if not path.is_file():
        raise NotFound(f"loss.weights={path}: there is no such file.")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no checkpoint
        raise Refusal(f"loss.weights={path} is no file of weights ({type(error).__name__}).") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise Refusal(f"loss.weights={path} holds no tensors by name; wanted a state_dict as torchvision saves it.")
    return found
