"""LPIPS: how far pictures look from their originals."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import get_model_weights

from ldm.errors import NotFound, Refusal
from ldm.files.folder import load_tensors
from ldm.measure import Estimate, Reference, Rows, weights_sha256
from ldm.types import Batch

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class Lpips:
    """Mean over pictures of the distance in a network's features, weighed as people judge (arXiv 1801.03924, eq. 1).

    The trained heads are version 0.1, as torchmetrics carries them. weights: `pretrained` downloads torchvision's of the network,
    alex (most tables), vgg or squeeze; or a local file of them.
    """

    against = None

    def __init__(self, net: str = "alex", weights: str = "pretrained", of: str = "reconstruction") -> None:
        if net not in BACKBONES:
            raise Refusal(f"metric.lpips.net={net}: wanted one of {', '.join(BACKBONES)}.")
        self.of, self.net = of, _LPIPS(pretrained=True, net=net, pnet_rand=True)
        found = [value for name, value in _read(BACKBONES[net], weights).items() if name.startswith("features.")]
        own = self.net.net.state_dict()  # the same layers in the same order, under other names
        if [v.shape for v in own.values()] != [v.shape for v in found]:
            raise Refusal(f"metric.lpips.weights={weights} does not hold the features of torchvision's {BACKBONES[net]}.")
        self.net.net.load_state_dict(dict(zip(own, found)))
        self.net.eval().requires_grad_(False)
        self.protocol = {"extractor": f"lpips 0.1 {net}", "sha256": weights_sha256(self.net), "resize": "none"}

    @torch.no_grad()
    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: image, the originals -> lpips: (B)."""
        return {"lpips": self.net.to(images.device)(images, batch["image"]).reshape(-1)}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `lpips`, or `drawing_lpips`, at least 0."""
        return {"lpips" if self.of == "reconstruction" else f"{self.of}_lpips": Estimate.mean(rows["lpips"])}


def _read(backbone: str, weights: str) -> dict[str, Tensor]:
    if weights == "pretrained":
        return get_model_weights(backbone).DEFAULT.get_state_dict(check_hash=True, weights_only=True)
    path = Path(weights)
    if not path.is_file():
        raise NotFound(f"metric.lpips.weights={weights}: there is no such file; wanted torchvision's {backbone}.")
    found = load_tensors(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    return found
