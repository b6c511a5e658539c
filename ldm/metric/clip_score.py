"""CLIP score: how near a picture is to its caption in a CLIP.

score = 100 max(cos(image, text), 0)  (https://arxiv.org/abs/2104.08718, section 3, with the weight 100 of torchmetrics)
"""

from collections.abc import Mapping

from torch import Tensor

from ldm.measure import Estimate, Reference, Rows
from ldm.metric._pairs import Pairs
from ldm.types import Batch


class ClipScore:
    """The mean over pictures of their CLIP scores; `scores` holds them picture by picture.

    `model` and `pretrained` are any CLIP of open_clip, by name and tag or local file, or `local-dir:FOLDER`. Scores of different
    CLIPs do not compare.
    """

    of, against = "drawing", None

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        self.pairs = Pairs(model, pretrained, "metric.clip_score")
        self.protocol = self.pairs.protocol

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: caption -> image, text: (B, E), as `Pairs`."""
        return self.pairs.look(images, batch)

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> {"clip_score": in [0, 100]}."""
        self.scores = 100 * (rows["image"] * rows["text"]).sum(1).clamp(min=0)
        return {"clip_score": Estimate.mean(self.scores)}
