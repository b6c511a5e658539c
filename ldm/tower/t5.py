"""The encoder of T5 v1.1 (https://arxiv.org/abs/1910.10683, with the gated GELU of https://arxiv.org/abs/2002.05202).

h <- h + attention(norm(h));  h <- h + W_o (gelu(W_0 x) * W_1 x), x = norm(h)
attention: softmax(q k^T + bias of the distance's bucket) v, without the usual 1 / sqrt(D)

Its tensors have the names of the published files, which are those of transformers' T5EncoderModel.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ldm.errors import Refusal

TIED = "encoder.embed_tokens.weight"  # `shared.weight` once more, in some files
# config.json's words of the published sizes; their other words are those of SIZES[0].
COMMON = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
SIZES = {
    "google/t5-v1_1-small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "google/t5-v1_1-base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "google/t5-v1_1-large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "google/t5-v1_1-xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "google/t5-v1_1-xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}


class T5(nn.Module):
    """Token ids -> hidden states, each token attending to all others.

    Positions enter by a learnt bias of the attention's logits, one for each head and bucket of distances (section 2.1).

    Args:
        words: of the vocabulary.
        width: features of a token, D.
        depth: blocks.
        heads: of attention.
        head_width: features of a head.
        inner: features inside the feed-forward.
        buckets: of distances.
        reach: the distance from which on all are in the last bucket.
        eps: of the norms.
    """

    def __init__(
        self, words: int, width: int, depth: int, heads: int, head_width: int, inner: int, buckets: int, reach: int, eps: float
    ) -> None:
        super().__init__()
        self.width, self.depth, self.buckets, self.reach = width, depth, buckets, reach
        self.shared = nn.Embedding(words, width)
        blocks = nn.ModuleList(Block(width, heads, head_width, inner, eps) for _ in range(depth))
        blocks[0].layer[0]["SelfAttention"].relative_attention_bias = nn.Embedding(buckets, heads)
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": nn.RMSNorm(width, eps=eps)})

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """ids: (B, L), mask: (B, L) bool, True where a token is read -> depth + 1 hidden states, (B, L, D) each: before the first
        block, after the first, ..., after the last; the last one is normalised."""
        blocks, h = self.encoder["block"], self.shared(ids)
        table = blocks[0].layer[0]["SelfAttention"].relative_attention_bias
        bias = table(self.distances(ids.shape[1], ids.device)).permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], -math.inf)
        states = [h]
        for block in blocks:
            states.append(block(states[-1], bias))
        states[-1] = self.encoder["final_layer_norm"](states[-1])
        return states

    def distances(self, length: int, device: torch.device) -> Tensor:
        """-> (L, L), the bucket of the distance from each token (row) to each (column).

        Half of the buckets are for earlier tokens, half for later ones. Half of each are for one distance each, from 0 on; the
        others' widths grow geometrically up to `reach`.
        """
        place = torch.arange(length, device=device)
        step = place[None, :] - place[:, None]
        half = self.buckets // 2
        near, distance = half // 2, step.abs()
        growth = torch.log(distance.clamp(min=1).float() / near) / math.log(self.reach / near) * (half - near)
        return (step > 0) * half + torch.where(distance < near, distance, (near + growth.long()).clamp(max=half - 1))


class Block(nn.Module):
    """Attention, then a gated feed-forward, each on the normalised features and added to them.

    Args:
        width: features of a token, D.
        heads: of attention.
        head_width: features of a head.
        inner: features inside the feed-forward.
        eps: of the norms.
    """

    def __init__(self, width: int, heads: int, head_width: int, inner: int, eps: float) -> None:
        super().__init__()
        parts = {"SelfAttention": Attention(width, heads, head_width), "DenseReluDense": Gated(width, inner)}
        norms = (nn.RMSNorm(width, eps=eps) for _ in parts)
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": norm}) for (name, part), norm in zip(parts.items(), norms)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: (B, L, D), bias: (1 or B, heads, L, L) -> (B, L, D)."""
        attend, feed = self.layer
        x = x + attend["SelfAttention"](attend["layer_norm"](x), bias)
        return x + feed["DenseReluDense"](feed["layer_norm"](x))


class Attention(nn.Module):
    """Self-attention of all tokens to all, with a bias, unscaled."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: (B, L, D), bias: (1 or B, heads, L, L) -> (B, L, D)."""
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """W_o (gelu(W_0 x) * W_1 x) (GEGLU, https://arxiv.org/abs/2002.05202, equation 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.wo(gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def build_t5(config: Mapping[str, Any], place: str) -> T5:
    """transformers' config of a T5 -> its encoder, with random weights; errors name `place`, the config's file.

    Raises:
        Refusal: it is no T5 v1.1, or lacks a size.
    """
    only = {"model_type": ("t5",), "feed_forward_proj": ("gated-gelu",)}
    if wrong := [f"{name}={config.get(name)}" for name, known in only.items() if config.get(name) not in known]:
        raise Refusal(
            f"{place} has {', '.join(wrong)}; T5 v1.1 (model_type=t5, feed_forward_proj=gated-gelu) is known. "
            "condition=[language] reads any encoder of transformers."
        )
    sizes = {"words": "vocab_size", "width": "d_model", "depth": "num_layers", "heads": "num_heads", "head_width": "d_kv"}
    if lacking := [name for name in (*sizes.values(), "d_ff") if name not in config]:
        raise Refusal(f"{place} does not say {', '.join(lacking)}.")
    usual = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
    buckets, reach, eps = (config.get(name, value) for name, value in usual.items())
    return T5(**{ours: config[name] for ours, name in sizes.items()}, inner=config["d_ff"], buckets=buckets, reach=reach, eps=eps)


def encoder_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a T5 -> its encoder's, without decoder and head; the embeddings may be called `TIED` instead."""
    encoder = {n: x for n, x in weights.items() if n.startswith(("shared.", "encoder.")) and n != TIED}
    return encoder if "shared.weight" in encoder or TIED not in weights else {"shared.weight": weights[TIED], **encoder}
