"""How much more than bicubic interpolation a drawing knows of the picture that it was told at low resolution."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ldm.errors import Refusal
from ldm.files.weights import weights_hash
from ldm.measure import Estimate, Reference, Rows
from ldm.tower.clip import load_clip, see
from ldm.types import Batch


class SuperResolution:
    """Means over pictures, of the drawing and of the low resolution brought up by bicubic interpolation: PSNR in dB, peak-to-peak
    2, and the distance of a CLIP's embeddings, 1 - cosine, which stands in for LPIPS where that has no weights. `_gain`: drawing
    less bicubic, in dB.

    model, pretrained: open_clip's name and tag or local file, or `local-dir:FOLDER`.
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
        seen = [normalize(self.visual.to(x.device)(see(self.visual, x)).float(), dim=1) for x in (*pair, real)]
        distance = torch.stack([1 - (x * seen[-1]).sum(1) for x in seen[:2]], dim=1)
        return {"psnr": 10 * torch.log10(4 / error.clamp(min=4e-6)), "distance": distance}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `super_resolution_psnr`, `_gain`, `_distance`, and bicubic's `bicubic_psnr`, `bicubic_distance`."""
        (psnr, psnr_bicubic), (distance, distance_bicubic) = rows["psnr"].unbind(1), rows["distance"].unbind(1)
        gains = {"psnr": psnr, "gain": psnr - psnr_bicubic, "distance": distance}
        numbers = {f"super_resolution_{name}": values for name, values in gains.items()}
        numbers |= {"bicubic_psnr": psnr_bicubic, "bicubic_distance": distance_bicubic}
        return {name: Estimate.mean(values) for name, values in numbers.items()}
