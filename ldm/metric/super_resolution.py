"""How much nearer than bicubic interpolation a drawing comes to the picture whose low resolution it was given.

PSNR = 10 log10(4 / MSE) in dB, for pixels in [-1, 1];  distance = 1 - cosine of a CLIP's image embeddings
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ldm.errors import Refusal
from ldm.files.weights import weights_hash
from ldm.measure import Estimate, Reference, Rows
from ldm.tower.clip import load_clip, preprocess
from ldm.types import Batch


class SuperResolution:
    """Means over pictures of PSNR and of the distance in a CLIP, of the drawing and of bicubic interpolation.

    The distance stands in for LPIPS, whose weights must be downloaded. `model` and `pretrained` are open_clip's name and tag or
    local file, or `local-dir:FOLDER`.
    """

    of, against = "drawing", None

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        self.visual = load_clip(model, pretrained, "metric.super_resolution").visual
        self.protocol = {"extractor": f"psnr, and distance in open_clip {model}", "sha256": weights_hash(self.visual)}

    @torch.no_grad()
    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: image, low (B, 3, h', w') -> psnr, distance: (B, 2), of drawing and bicubic.

        Raises:
            Refusal: the requests have no low resolution.
        """
        if "low" not in batch:
            raise Refusal(
                f"super_resolution reads the field 'low', and there is only {sorted(batch)} (condition=[low_resolution])."
            )
        real = batch["image"]
        bicubic = interpolate(batch["low"], real.shape[2:], mode="bicubic").clamp(-1, 1)
        pair = [images, bicubic]
        error = torch.stack([(x - real).square().mean((1, 2, 3)) for x in pair], dim=1)
        features = [normalize(self.visual.to(x.device)(preprocess(self.visual, x)).float(), dim=1) for x in (*pair, real)]
        distance = torch.stack([1 - (x * features[-1]).sum(1) for x in features[:2]], dim=1)
        return {"psnr": 10 * torch.log10(4 / error.clamp(min=4e-6)), "distance": distance}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `super_resolution_psnr` and `_distance` of the drawings, `bicubic_psnr` and `bicubic_distance` of interpolation, and
        `super_resolution_gain`, the difference of the two PSNR in dB.
        """
        (psnr, psnr_bicubic), (distance, distance_bicubic) = rows["psnr"].unbind(1), rows["distance"].unbind(1)
        gains = {"psnr": psnr, "gain": psnr - psnr_bicubic, "distance": distance}
        numbers = {f"super_resolution_{name}": values for name, values in gains.items()}
        numbers |= {"bicubic_psnr": psnr_bicubic, "bicubic_distance": distance_bicubic}
        return {name: Estimate.mean(values) for name, values in numbers.items()}
