"""DiT's tensors by the names of the published files (facebookresearch/DiT, SiT, LightningDiT) and by diffusers'.

The class table is a condition's: `y_embedder.embedding_table` there, the label's table here. SiT and LightningDiT run time
from noise to data and say data - noise; read with `reverse`, the last layer's sign is turned, and the noise level is told by
`level=data_time`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ldm.backbone.dit import DiT
from ldm.errors import Refusal
from ldm.interop.conditions import IDENTITY
from ldm.interop.tie import Shapes, Tie, renamer, repeated, same, stacked, tied
from ldm.types import Widths

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
DIFFUSERS = renamer(
    {
        "embed": "pos_embed.proj",
        "blocks": "transformer_blocks",
        "attend.out": "attn1.to_out.0",
        "modulate": "norm1.linear",
        "feed.wide": "ff.net.0.proj",
        "feed.out": "ff.net.2",
        "last.modulate": "proj_out_1",
        "last.out": "proj_out_2",
    }
)
TABLE = "y_embedder.embedding_table.weight"
ROTARY = "feat_rope."  # tables of angles, computed again
HEADS = {1152: 16}  # of XL; the others' heads are 64 wide


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


def diffusers(names: Iterable[str], depth: int) -> dict[str, Tie]:
    """Our names -> those of diffusers' DiTTransformer2DModel, each of whose blocks holds the noise level's embedding again."""

    def tie(name: str) -> Tie:
        if name.startswith("level."):
            _, layer, leaf = name.split(".")
            word = f"timestep_embedder.linear_{1 if layer == '0' else 2}.{leaf}"
            return repeated(*(f"transformer_blocks.{i}.norm1.emb.{word}" for i in range(depth)))
        if ".attend.qkv." in name:
            block, leaf = name.replace("blocks", "transformer_blocks").split(".attend.qkv.")
            return stacked(*(f"{block}.attn1.to_{letter}.{leaf}" for letter in "qkv"))
        return same(DIFFUSERS(name))

    return tied((name for name in names if name != "position"), tie)


def diffusers_table(depth: int) -> dict[str, Tie]:
    """The class table's places in diffusers' network, one a block."""
    word = "class_embedder.embedding_table.weight"
    return {"table": repeated(*(f"transformer_blocks.{i}.norm1.emb.{word}" for i in range(depth)))}


def dit_shapes(channels: int, **settings: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a DiT that is told a vector as wide as it is; it is not built in memory."""
    with torch.device("meta"):
        net = DiT(channels, Widths(vector=settings["width"]), **{"vector": lambda *_: torch.nn.Identity(), **settings})
    return {name: tuple(x.shape) for name, x in net.state_dict().items()}


def settings_of(shapes: Shapes) -> tuple[dict[str, Any], int]:
    """The published names and shapes -> how `DiT` is built, and its channels.

    How many heads there are does not show in any shape: the published networks' rule is taken.

    Raises:
        Refusal: this is no such network.
    """
    try:
        width, channels, patch = shapes["x_embedder.proj.weight"][:3]
        outward = shapes["final_layer.linear.weight"][0]
        settings = {
            "size": math.isqrt(shapes["pos_embed"][1]) * patch,
            "patch": patch,
            "width": width,
            "depth": sum(name.endswith(".attn.qkv.weight") for name in shapes),
            "heads": HEADS.get(width, max(1, width // 64)),
            "learn_range": outward == 2 * patch * patch * channels,
            "rms_norm": "blocks.0.norm1.weight" in shapes,
            "swiglu": "blocks.0.mlp.w12.weight" in shapes,
            "rotary": any(name.startswith(ROTARY) for name in shapes),
            "norm_heads": "blocks.0.attn.q_norm.weight" in shapes,
        }
    except KeyError as error:
        raise Refusal(f"This is no DiT in the published layout: {error} is missing among its tensors.") from error
    return settings, channels


def node(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a DiT to whose noise level's embedding the class' is added as it is."""
    return {"_target_": "ldm.backbone.dit.DiT", "_partial_": True, **settings, "vector": IDENTITY}
