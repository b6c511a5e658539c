"""DiT's tensors by the names of the published files (facebookresearch/DiT, SiT, LightningDiT) and by diffusers'.

The class table is a condition's: `y_embedder.embedding_table` there, the label's table here. SiT and LightningDiT run time
from noise to data and say data - noise; read with `reverse`, the last layer's sign is turned, and the noise level is told by
`level=data_time`.
"""

from collections.abc import Iterable

from ldm.interop.tie import Tie, renamer, same, tied

PUBLISHED = renamer(
    {
        "embed": "x_embedder.proj",
        "position": "pos_embed",
        "level": "t_embedder.mlp",
        "attend.qkv": "attn.qkv",
        "attend.out": "attn.proj",
        "attend.norm_q": "attn.q_norm",
        "attend.norm_k": "attn.k_norm",
        "norm_in": "norm1",
        "norm_out": "norm2",
        "modulate": "adaLN_modulation.1",
        "last.modulate": "final_layer.adaLN_modulation.1",
        "last.norm": "final_layer.norm_final",
        "last.out": "final_layer.linear",
    }
)
FEEDS = {False: renamer({"feed.wide": "mlp.fc1", "feed.out": "mlp.fc2"})}
FEEDS[True] = renamer({"feed.wide": "mlp.w12", "feed.out": "mlp.w3"})
TABLE = "y_embedder.embedding_table.weight"


def published(names: Iterable[str], swiglu: bool = False, reverse: bool = False) -> dict[str, Tie]:
    """Our names -> the published ones."""

    def tie(name: str) -> Tie:
        theirs = PUBLISHED(FEEDS[swiglu](name))
        if name == "position":
            return Tie((theirs,), lambda x: x[0], lambda x: (x[None],))
        if reverse and name.startswith("last.out."):
            return Tie((theirs,), lambda x: -x, lambda x: (-x,))
        return same(theirs)

    return tied(names, tie)
