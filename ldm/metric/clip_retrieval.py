"""Whether a CLIP finds, among all captions asked for, the one that a picture was drawn for."""

from collections.abc import Mapping

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.clip import load_clip, see
from ldm.measure import Estimate, Reference, Rows
from ldm.types import Batch


class ClipRetrieval:
    """Top-1 of the captions asked for, by cosine in a CLIP (R-precision, https://arxiv.org/abs/1711.10485, section 5)."""

    of, against = "drawing", None

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        self.clip = load_clip(model, pretrained, "metric.clip_retrieval")
        self.tokenizer = open_clip.get_tokenizer(model, context_length=self.clip.context_length)
        self.protocol = {"extractor": f"open_clip {model} {pretrained or ''}".strip(), "texts": True}

    @torch.no_grad()
    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) drawn, in [-1, 1]; batch: caption -> image, text: (B, D)."""
        images = self.clip.encode_image(see(self.clip.visual, images.float().cpu()))
        return {"image": images, "text": self.clip.encode_text(self.tokenizer(list(batch["caption"])))}

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> {"clip_retrieval_top1": share in [0, 1]}."""
        images, texts = (normalize(rows[name], dim=1) for name in ("image", "text"))
        hit = (images @ texts.T).argmax(1) == torch.arange(len(images))
        return {"clip_retrieval_top1": Estimate.mean(hit.float())}
