"""The tensors of blocks of two sequences by diffusers' names, which MMDiT and Flux share."""

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.interop.bundle import Bundle
from ldm.interop.tie import Tie, renamer, same, stacked

AROUND = {
    "level.0": "time_text_embed.timestep_embedder.linear_1",
    "level.2": "time_text_embed.timestep_embedder.linear_2",
    "vector.0": "time_text_embed.text_embedder.linear_1",
    "vector.2": "time_text_embed.text_embedder.linear_2",
    "guidance.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance.2": "time_text_embed.guidance_embedder.linear_2",
    "read": "context_embedder",
    "blocks": "transformer_blocks",
    "picture.modulate": "norm1.linear",
    "picture.attend.out": "attn.to_out.0",
    "picture.attend.norm_q": "attn.norm_q",
    "picture.attend.norm_k": "attn.norm_k",
    "picture.again.out": "attn2.to_out.0",
    "picture.again.norm_q": "attn2.norm_q",
    "picture.again.norm_k": "attn2.norm_k",
    "picture.feed.wide": "ff.net.0.proj",
    "picture.feed.out": "ff.net.2",
    "text.modulate": "norm1_context.linear",
    "text.attend.out": "attn.to_add_out",
    "text.attend.norm_q": "attn.norm_added_q",
    "text.attend.norm_k": "attn.norm_added_k",
    "text.feed.wide": "ff_context.net.0.proj",
    "text.feed.out": "ff_context.net.2",
    "last.modulate": "norm_out.linear",
    "last.out": "proj_out",
}
NAMES = {"mmdit": renamer({**AROUND, "embed": "pos_embed.proj"}), "flux": renamer({**AROUND, "embed": "x_embedder"})}
APART = {"picture.attend": "attn.to_{}", "picture.again": "attn2.to_{}", "text.attend": "attn.add_{}_proj"}


def paired(name: str, family: str, swapped: bool) -> Tie:
    """A name of ours outside Flux' blocks of one sequence -> diffusers'; `swapped` says that scale stands before shift there."""
    for place, word in APART.items():
        if f".{place}.qkv." in name:
            block, leaf = name.replace("blocks", "transformer_blocks").split(f".{place}.qkv.")
            return stacked(*(f"{block}.{word.format(letter)}.{leaf}" for letter in "qkv"))
    theirs = NAMES[family](name)
    return Tie((theirs,), turned_round, lambda x: (turned_round(x),)) if swapped else same(theirs)


def check_told(bundle: Bundle, *more: str) -> None:
    """Raises ValueError where a model is told more than published ones: text, and conditions of the classes `more`."""
    known = {"Text", "Texts", "Language", "Silence", *more}
    condition = bundle.recipe["condition"].items()
    if strange := [f"condition.{name}" for name, node in condition if node["_target_"].rpartition(".")[2] not in known]:
        raise Refusal(f"Other layouts know such models told by text; this one has {', '.join(strange)}. Use --to ldm.")


def turned_round(x: Tensor) -> Tensor:
    """The second half before the first."""
    return torch.cat(x.chunk(2)[::-1])


def depth_of(names: object, place: str) -> int:
    """How many blocks stand at `place`, of names such as place.17.attn.qkv.weight.

    Raises:
        ValueError: none do.
    """
    return 1 + max(int(name.removeprefix(place).split(".")[0]) for name in names if name.startswith(place))
