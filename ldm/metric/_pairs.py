"""What a CLIP sees of a picture and reads in its caption: shared by the metrics that compare the two."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.errors import Refusal
from ldm.files.weights import weights_hash
from ldm.measure import Rows, transformed
from ldm.tower.clip import load_clip, settings, transform
from ldm.types import Batch


class Pairs:
    """Pictures and captions through a CLIP's two towers, preprocessed by open_clip's transform and tokenizer.

    `model` and `pretrained` are open_clip's name and tag or local file, or `local-dir:FOLDER`; errors name the setting `option`.
    """

    def __init__(self, model: str, pretrained: str | None, option: str) -> None:
        import open_clip

        self.option = option
        self.clip = load_clip(model, pretrained, option)
        self.tokenizer = open_clip.get_tokenizer(model, context_length=self.clip.context_length)
        self.transform = transform(self.clip.visual)
        name = f"open_clip {model} {pretrained or ''}".strip()
        sha256 = weights_hash(self.clip)
        self.protocol = {
            "extractor": f"{name}, pictures and captions",
            "sha256": sha256,
            "resize": "open_clip's own, on 8-bit pictures",
            "preprocess": settings(self.clip.visual),
        }

    @torch.no_grad()
    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: caption -> image, text: (B, E) of unit length.

        Raises:
            Refusal: the requests have no captions.
        """
        if "caption" not in batch:
            raise Refusal(f"{self.option} compares pictures with captions, and there is only {sorted(batch)} (prompts=FILE).")
        self.clip.to(images.device)
        image = self.clip.encode_image(transformed(images, self.transform))
        text = self.clip.encode_text(self.tokenizer(list(batch["caption"])).to(images.device))
        return {"image": normalize(image.float(), dim=1), "text": normalize(text.float(), dim=1)}
