"""Whether a CLIP finds, among all captions asked for, the one that a picture was drawn for."""

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.clip import load_clip, see
from ldm.types import Batch


class ClipRetrieval:
    """Top-1 of the captions asked for, by cosine in a CLIP (R-precision, https://arxiv.org/abs/1711.10485, section 5)."""

    of = "drawing"

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        self.clip = load_clip(model, pretrained, "metric.clip_retrieval")
        self.tokenizer = open_clip.get_tokenizer(model, context_length=self.clip.context_length)
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []

    def prepare(self, data: object) -> None:
        """Needs nothing beforehand."""

    @torch.no_grad()
    def update(self, images: Tensor, batch: Batch) -> None:
        """images: (B, 3, h, w) drawn, in [-1, 1]; batch: caption."""
        self.images.append(self.clip.encode_image(see(self.clip.visual, images.float().cpu())))
        self.texts.append(self.clip.encode_text(self.tokenizer(list(batch["caption"]))))

    def compute(self) -> dict[str, float]:
        """-> {"clip_retrieval_top1": share in [0, 1]}."""
        images, texts = (normalize(torch.cat(x), dim=1) for x in (self.images, self.texts))
        hit = (images @ texts.T).argmax(1) == torch.arange(len(images))
        return {"clip_retrieval_top1": hit.float().mean().item()}
