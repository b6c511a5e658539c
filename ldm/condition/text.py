"""Captions, read by the frozen text tower of a CLIP."""

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from ldm.clip import load_clip, read, spoken
from ldm.folder import LOCAL, load_tensors
from ldm.types import Cond, Widths


class Text(nn.Module):
    """A caption -> tokens (B, L, D) of the text tower's layers, and its pooled vector.

    `model` and `pretrained` are open_clip's: a name with a tag or a local file, or `local-dir:FOLDER`. `layers` counts hidden
    states: 0 before the transformer, k after its k-th block, -1 the last; several are joined by width. `final_norm` puts
    the tower's last LayerNorm on all but 0. `pooled` adds the projected text feature as a vector. Padding is masked.

    With `whiten`, the channels of each layer, and of the pooled vector, become uncorrelated with zero mean and unit variance over
    the training captions; the statistics lie beside the tower in `statistics.safetensors` (the `contrast` stage writes them).
    A dropped caption is the empty prompt.
    """

    frozen = ("tower",)

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        layers: Sequence[int] = (-1,),
        final_norm: bool = True,
        pooled: bool = False,
        whiten: bool = False,
        key: str = "caption",
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.key, self.rate, self.layers, self.final_norm, self.pooled = key, rate, tuple(layers), final_norm, pooled
        self.tower = text_tower(load_clip(model, pretrained, "condition.text"))
        self.tokenizer = open_clip.get_tokenizer(model, context_length=self.tower.context_length)
        width = self.tower.token_embedding.embedding_dim
        self.widths = Widths(tokens=width * len(self.layers), vector=self.tower.text_projection.shape[1] if pooled else 0)
        self.whiten = whiten
        if whiten:
            count = len(self.tower.transformer.resblocks) + 1
            names = [f"layer.{i % count}" for i in self.layers] + (["pooled"] if pooled else [])
            table = statistics(model)
            means, mixes = zip(*(whitening(table[f"{n}.mean"], table[f"{n}.covariance"]) for n in names))
            tokens = len(self.layers)
            self.register_buffer("token_mean", torch.cat(means[:tokens]))
            self.register_buffer("token_mix", torch.block_diag(*mixes[:tokens]))
            if pooled:
                self.register_buffer("vector_mean", means[-1])
                self.register_buffer("vector_mix", mixes[-1])

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool, True where the caption is withheld -> tokens, their mask, vector."""
        captions = ["" if d else v for v, d in zip(value, drop.tolist())]
        ids = self.tokenizer(captions).to(self.tower.token_embedding.weight.device)
        with torch.no_grad():
            hidden, vector = read(self.tower, ids)
        states = [self.tower.ln_final(h) if self.final_norm and h is not hidden[0] else h for h in self._chosen(hidden)]
        tokens = torch.cat(states, dim=2)
        if self.whiten:
            tokens = (tokens - self.token_mean) @ self.token_mix
            vector = (vector - self.vector_mean) @ self.vector_mix if self.pooled else None
        return Cond(tokens=tokens, mask=spoken(ids), vector=vector if self.pooled else None)

    def _chosen(self, hidden: list[Tensor]) -> list[Tensor]:
        if not all(-len(hidden) <= i < len(hidden) for i in self.layers):
            raise ValueError(
                f"condition.text.layers={list(self.layers)}: this tower has the hidden states 0 to {len(hidden) - 1}, "
                f"or -1 to {-len(hidden)}."
            )
        return [hidden[i] for i in self.layers]


def statistics(model: str) -> dict[str, Tensor]:
    """The mean and covariance of each layer over the training captions, from beside a local tower.

    Raises:
        FileNotFoundError: they are not there.
    """
    path = Path(model.removeprefix(LOCAL)) / "statistics.safetensors"
    if not model.startswith(LOCAL) or not path.is_file():
        raise FileNotFoundError(
            f"condition.text.whiten=true needs {path}, the statistics of the training captions, which the `contrast` stage "
            "writes. Use such a folder as condition.text.model, or condition.text.whiten=false."
        )
    return load_tensors(path)


def whitening(mean: Tensor, covariance: Tensor, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """mean: (D), covariance: (D, D) -> mean and W with (x - mean) @ W white (ZCA).

    A `ridge` of the mean eigenvalue keeps directions that the captions hardly use from being blown up.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = (values.clamp(min=0) + ridge * values.mean()).rsqrt()
    return mean, (vectors * scale @ vectors.T).float()


def text_tower(clip: nn.Module) -> nn.Module:
    """A CLIP without its image tower."""
    if not hasattr(clip, "token_embedding"):
        return clip.text
    del clip.visual
    return clip
