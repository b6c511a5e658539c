"""Any image network of timm, with timm's own preprocessing: DINOv2, DINOv3, ConvNeXt, ..."""

import inspect

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.errors import Refusal
from ldm.extractor._weights import frozen, read_weights
from ldm.measure import Rows, transformed


class Timm:
    """Pictures of any size -> `features` (B, D), before the classifier.

    `model` is timm's name. `weights` is a local file, which must have `sha256` where that is given, or `pretrained`, which
    downloads timm's. `size` is the side, in pixels, that pictures are resized to; None for the network's default.

    Raises:
        Refusal: the weights are of another network. NotFound: there is no such file.
    """

    def __init__(self, model: str, weights: str = "pretrained", size: int | None = None, sha256: str | None = None) -> None:
        sides = {} if size is None else {"img_size": size}
        self.net = timm.create_model(model, num_classes=0, pretrained=weights == "pretrained", **sides)
        if weights != "pretrained":
            _load(self.net, read_weights(weights, "pretrained", "timm's", sha256))
        config = timm.data.resolve_model_data_config(self.net)
        config |= {} if size is None else {"input_size": (3, size, size)}
        self.transform = timm.data.create_transform(**config, is_training=False)
        self.size, self.mean, self.std = tuple(config["input_size"][1:]), config["mean"], config["std"]
        resize = f"timm's own to {config['input_size'][-1]}, {config['interpolation']}, antialiased"
        self.protocol = frozen(self.net, f"timm {model}", resize)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Rows:
        """images: (B, 3, h, w) in [-1, 1] -> features: (B, D)."""
        return {"features": self.net.to(images.device)(transformed(images, self.transform)).float()}

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """images: (B, 3, h, w) in [-1, 1] -> the network's features of each patch after its last norm, (B, D, h', w').

        The pictures are resized and normalised on the device, and not rounded to 8 bits, as they are for metrics.
        """
        mean, std = (images.new_tensor(numbers).view(3, 1, 1) for numbers in (self.mean, self.std))
        resized = interpolate(images, self.size, mode="bicubic", antialias=True) if images.shape[2:] != self.size else images
        pixels = ((resized + 1) / 2 - mean) / std
        return self.net.to(images.device).forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[-1]


def _load(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads published weights, in place, and adapts them to the picture's size; a classifier among them is left out."""
    adapt = getattr(inspect.getmodule(type(net)), "checkpoint_filter_fn", None)
    missing, unknown = net.load_state_dict(weights if adapt is None else adapt(weights, net), strict=False)
    unknown = [name for name in unknown if name.split(".")[0] not in ("head", "fc", "classifier")]
    if missing or unknown:
        raise Refusal(f"The weights are of another network: missing {missing[:3]}, unknown {unknown[:3]}.")
