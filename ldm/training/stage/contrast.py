"""Stage 1: trains a CLIP on pictures and captions. From then on it is the frozen CLIP of the other stages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.embedder import texts
from ldm.files.folder import save_tensors, write_text
from ldm.tower.clip import embed_text, text_mask
from ldm.tower.cut import Cut
from ldm.training.base import CAPTIONS, Stage
from ldm.types import Batch, DataModule, Draw


class Contrast(Stage):
    """open_clip's CLIP under its ClipLoss (https://arxiv.org/abs/2103.00020, figure 3), over all ranks' pictures.

    `clip` is open_clip's model config: embed_dim, vision_cfg, text_cfg. Exports a folder that open_clip loads as
    `local-dir:FOLDER`, with the text features' statistics over the training captions beside it.
    """

    trains = "clip"
    compiled = ("clip.visual", "clip.transformer")

    def __init__(self, clip: Mapping[str, Any], **stage: Any) -> None:
        super().__init__(**stage)
        self.clip = open_clip.CLIP(**clip, output_dict=False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.clip.context_length)
        self.statistics: dict[str, Tensor] = {}
        self.cut = Cut(self.clip.context_length - 2, lambda captions: [len(self.tokenizer.encode(c)) for c in captions])
        self.told_of_cut = False

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """batch: image (B, 3, h, w), caption -> loss, and top-1 retrieval of captions by pictures within the batch."""
        ids = self.tokenizer(texts(batch["caption"]))
        if self.training:
            self.cut.count(batch["caption"], (ids[:, -1] != 0).tolist())
        image, text = self.clip.encode_image(batch["image"], True), encode_text(self.clip, ids, self.device)
        world = self.trainer.world_size if self.training else 1
        loss = open_clip.ClipLoss(gather_with_grad=True, rank=self.global_rank, world_size=world)
        hit = (image @ text.T).argmax(1) == torch.arange(len(image), device=self.device)
        return {"loss": loss(image, text, self.clip.logit_scale.exp()), "top1": hit.float().mean()}

    def on_train_batch_end(self, *_: Any) -> None:
        """Keeps the temperature within 1 / 100, as CLIP does, and says once how many captions are cut."""
        self.clip.logit_scale.data.clamp_(max=4.6052)
        self._tell_of_cut(CAPTIONS)

    def on_train_end(self) -> None:
        """A training of few captions says it now."""
        self._tell_of_cut(1)

    def _tell_of_cut(self, least: int) -> None:
        if self.global_rank == 0 and self.cut.cut and self.cut.seen >= least and not self.told_of_cut:
            self.told_of_cut = True
            print(self.cut, flush=True)

    @torch.no_grad()
    def finish(self, data: DataModule) -> None:
        """Measures each text layer's and the pooled vector's mean and covariance over the training captions."""
        sums: dict[str, tuple[int, Tensor, Tensor]] = {}
        captions = data.train_set.captions()
        for start in range(0, len(captions), 256):
            ids = self.tokenizer(captions[start : start + 256]).to(self.device)
            hidden, pooled = embed_text(self.clip, ids)
            rows = {f"layer.{i}": (h if i == 0 else self.clip.ln_final(h))[text_mask(ids)] for i, h in enumerate(hidden)}
            for name, x in {**rows, "pooled": pooled}.items():
                x = x.double()
                count, total, square = sums.get(name, (0, 0, 0))
                sums[name] = (count + len(x), total + x.sum(0), square + x.T @ x)
        for name, (count, total, square) in sums.items():
            mean = total / count
            self.statistics[f"{name}.mean"] = mean.float().cpu()
            self.statistics[f"{name}.covariance"] = (square / count - torch.outer(mean, mean)).float().cpu()

    def export(self, folder: Path) -> None:
        """Writes open_clip_config.json, open_clip_model.safetensors and statistics.safetensors."""
        save_tensors(self.statistics, folder / "statistics.safetensors")
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        config = {"model_cfg": self.recipe["clip"], "preprocess_cfg": preprocess}
        write_text(json.dumps(config, indent=2), folder / "open_clip_config.json")
        save_tensors(self.clip.state_dict(), folder / "open_clip_model.safetensors")


def encode_text(clip: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """ids: (B, L), on the CPU -> (B, E) of unit length, what open_clip's encode_text says.

    Where no token looks ahead, what lies behind the longest caption's end, at a multiple of 4, is left out.
    """
    if clip.attn_mask is None or clip.text_pool_type != "argmax" or not isinstance(clip.text_projection, Tensor):
        return clip.encode_text(ids.to(device, non_blocking=True), True)
    length = min(-(-int(text_mask(ids).sum(1).max()) // 4) * 4, ids.shape[1])
    ids = ids[:, :length].to(device, non_blocking=True)
    x = clip.token_embedding(ids) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    return normalize(x[torch.arange(len(ids), device=device), ids.argmax(dim=1)] @ clip.text_projection, dim=-1)
