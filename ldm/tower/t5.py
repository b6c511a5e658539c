"""The encoder of T5 v1.1 (https://arxiv.org/abs/1910.10683, with the gated GELU of https://arxiv.org/abs/2002.05202).

Its tensors are called as in the published files, which are transformers' T5EncoderModel's.
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
    """Token ids -> hidden states, every token told of every other.

    Positions are told by a bias on the attention, of the distance's bucket (1910.10683, 2.1); attention is not scaled.
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
        """ids: (B, L), mask: (B, L) bool, True where a token is read -> (B, L, D) each: before the first block, after the first,
        and so on; the last is normed."""
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
        """-> (L, L) the bucket of each token's distance from each: half of them before and half behind; of these half are for
        the nearest, one each, and the others grow by a factor up to `reach`."""
        place = torch.arange(length, device=device)
        step = place[None, :] - place[:, None]
        half = self.buckets // 2
        near, far = half // 2, step.abs()
        wide = torch.log(far.clamp(min=1).float() / near) / math.log(self.reach / near) * (half - near)
        return (step > 0) * half + torch.where(far < near, far, (near + wide.long()).clamp(max=half - 1))


class Block(nn.Module):
    """Attention, then a gated feed-forward, each normed before and added."""

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
    """Of all tokens to all."""

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
    """GELU(x W0) * (x W1), and back (2002.05202, equation 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.wo(gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def build_t5(config: Mapping[str, Any], place: str) -> T5:
    """transformers' config of a T5 -> its encoder, with random weights.

    Raises:
        Refusal: it is no T5 v1.1.
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
    """The encoder's tensors of those of a T5, whose decoder and head are left, and whose table may stand under another name."""
    own = {n: x for n, x in weights.items() if n.startswith(("shared.", "encoder.")) and n != TIED}
    return own if "shared.weight" in own or TIED not in weights else {"shared.weight": weights[TIED], **own}
