"""LPIPS: perceptual distance in the features of a network trained on ImageNet, with weights fitted to people's judgements.

d(x, y) = sum over layers l of mean over pixels of w_l . (f_l(x) - f_l(y))^2, f_l of unit length over the channels
(https://arxiv.org/abs/1801.03924, equation 1)
"""

from pathlib import Path

import torch
import torchmetrics.functional.image as heads_of
from torch import Tensor, nn
from torchvision import models

from ldm.errors import Refusal
from ldm.files.weights import download, read_weights

ENDS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11), "squeeze": (1, 4, 7, 9, 10, 11, 12)}  # layers that are compared
LEAST = {"vgg": 16, "alex": 31, "squeeze": 17}  # pixels a side, below which a layer has nothing left
NETWORKS = {
    "vgg": (models.vgg16, models.VGG16_Weights),
    "alex": (models.alexnet, models.AlexNet_Weights),
    "squeeze": (models.squeezenet1_1, models.SqueezeNet1_1_Weights),
}


class Distance(nn.Module):
    """LPIPS, version 0.1; the fitted weights w_l are those that torchmetrics ships.

    Args:
        net: vgg (as in Latent Diffusion's loss), alex (as in most tables) or squeeze.
        weights: a local file of torchvision's network, .pth or .safetensors; None downloads it.
        setting: where `net` and `weights` are set, such as `loss`, for errors.
        instead: what else can be done, a sentence for errors.

    Raises:
        NotFound: no such file. Unreachable: nothing could be downloaded. Refusal: no such net, or a file of another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str, weights: str | None, setting: str, instead: str) -> None:
        super().__init__()
        if net not in ENDS:
            raise Refusal(f"{setting}.net={net}: there are {', '.join(ENDS)}.")
        self.net, self.ends, self.setting, self.instead = net, ENDS[net], setting, instead
        self.features = load_features(net, weights, setting, instead)[: self.ends[-1] + 1]
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        heads = read_weights(Path(heads_of.__file__).parent / "lpips_models" / f"{net}.pth")
        self.heads = nn.ParameterList([heads[f"lin{i}.model.1.weight"].clone() for i in range(len(self.ends))])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        """(B, 3, h, w) in [-1, 1] each -> a map (B, 1, h', w') for each compared layer, at least 0, the sum of whose means is the
        distance. Gradients flow to `images` alone.

        Raises:
            Refusal: the pictures are too small for the network.
        """
        height, width = images.shape[2:]
        if min(height, width) < LEAST[self.net]:
            raise Refusal(
                f"Pictures of {height}x{width} pixels are too small for {self.setting}.net={self.net}, which needs "
                f"{LEAST[self.net]}; take larger ones (data.size=...). {self.instead}"
            )
        with torch.no_grad():
            features = self.normalized(targets)
        errors = [(a - b).square() for a, b in zip(self.normalized(images), features)]
        with torch.autocast(images.device.type, enabled=False):
            return [nn.functional.conv2d(error, head.to(error)) for error, head in zip(errors, self.heads)]

    def normalized(self, images: Tensor) -> list[Tensor]:
        """(B, 3, h, w) in [-1, 1] -> features (B, D, h', w') of unit length over D, of each compared layer, in float32."""
        h, out = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.ends:
                wide = h.float()  # squares overflow in float16
                out.append(wide / (wide.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return out

    def train(self, mode: bool = True) -> "Distance":
        """Always in evaluation mode."""
        return super().train(False)


def load_features(net: str, weights: str | None, setting: str, instead: str) -> nn.Sequential:
    """-> the convolutional part of torchvision's network; the arguments are those of `Distance`.

    Raises:
        NotFound: no such file. Unreachable: nothing could be downloaded. Refusal: the file is of another network.
    """
    make, published = NETWORKS[net]
    url = published.IMAGENET1K_V1.url
    if weights is None:
        whole = download(url, instead=f"Or give {setting}.weights=FILE. {instead}")
    else:
        whole = read_weights(Path(weights), None, f"{setting}.weights", f"The file wanted is {url}.")
    with torch.device("meta"):
        features = make().features
    tensors = {name.removeprefix("features."): x for name, x in whole.items() if name.startswith("features.")}
    shapes, given = ({name: x.shape for name, x in held.items()} for held in (features.state_dict(), tensors))
    wrong = {name for name, _ in shapes.items() ^ given.items()}
    if wrong:
        raise Refusal(
            f"{setting}.weights={weights} does not hold torchvision's {make.__name__}: of its features, {sorted(wrong)[:3]} "
            f"are missing, unknown or of another shape ({len(wrong)} in all). The file wanted is {url}."
        )
    features.load_state_dict({name: x.float().clone() for name, x in tensors.items()}, assign=True)
    return features
