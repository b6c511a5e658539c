"""An nn.MultiheadAttention whose q, k and v matrices are separate layers, so that adapters can be attached to each.

softmax(q k^T / sqrt(D)) v, for each head of width D (https://arxiv.org/abs/1706.03762, equation 1)
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Split(nn.Module):
    """The attention of a batch-first nn.MultiheadAttention, by four frozen nn.Linear that share its memory."""

    PARTS = ("q", "k", "v")

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = whole.num_heads
        biases = (None,) * 3 if whole.in_proj_bias is None else whole.in_proj_bias.chunk(3)
        for part, weight, bias in zip(self.PARTS, whole.in_proj_weight.chunk(3), biases):
            self.add_module(part, _linear(weight, bias))
        self.out_proj = _linear(whole.out_proj.weight, whole.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """-> (B, N, C), and None in the place of the weights, as nn.MultiheadAttention is called and answers.

        Args:
            query: (B, N, C).
            key, value: (B, L, C).
            need_weights: not read: the weights are never given.
            attn_mask: (N, L), added to the logits, or bool, True where attention is forbidden.
        """
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        layers = ((self.q, query), (self.k, key), (self.v, value))
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, x in layers)
        return self.out_proj(scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)), None


def split_attention(module: nn.Module) -> None:
    """Replaces every batch-first nn.MultiheadAttention in a module, whose q, k and v lie in one matrix, by `Split`, in place."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None and child.batch_first:
                setattr(owner, name, Split(child).train(child.training))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer that shares these tensors' memory."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
