"""Whether a CLIP finds, among captions asked for, the one that a picture was drawn for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.measure import Estimate, Reference, Rows
from ldm.metric._pairs import Pairs
from ldm.types import Batch


class ClipRetrieval:
    """Top-1 by cosine in a CLIP (R-precision, https://arxiv.org/abs/1711.10485, section 5): is the picture's caption the nearest?

    It competes with `others` random captions, 99 in the paper, or, with None, with all captions of the evaluation. Equal captions
    do not compete. `model` and `pretrained` are open_clip's name and tag or local file, or `local-dir:FOLDER`.
    """

    of, against = "drawing", None

    def __init__(self, model: str, pretrained: str | None = None, others: int | None = None, seed: int = 0) -> None:
        self.pairs = Pairs(model, pretrained, "metric.clip_retrieval")
        self.protocol, self.others, self.seed = self.pairs.protocol, others, seed

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: caption -> image, text: (B, E), as `Pairs`."""
        return self.pairs.look(images, batch)

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> {"clip_retrieval_top1": share in [0, 1]}.

        Raises:
            Refusal: there are not so many other captions.
        """
        count = len(rows["image"])
        if self.others is not None and self.others >= count:
            raise Refusal(f"metric.clip_retrieval.others={self.others}: of {count} captions there are only {count - 1} others.")
        random = torch.Generator().manual_seed(self.seed)
        hits = []
        for i, (image, text) in enumerate(zip(rows["image"], rows["text"])):
            rivals = rows["text"]
            if self.others is not None:
                drawn = torch.randperm(count - 1, generator=random)[: self.others]
                rivals = rivals[drawn + (drawn >= i)]
            rivals = rivals[(rivals != text).any(dim=1)]
            hits.append(bool((rivals @ image < text @ image).all()))
        return {"clip_retrieval_top1": Estimate.mean(torch.tensor(hits).float())}
