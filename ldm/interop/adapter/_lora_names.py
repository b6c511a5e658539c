"""Every module of a model that a LoRA may update, by the names that it has in each layout."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.interop.bundle import BACKBONE, Bundle
from ldm.interop.find import network_of
from ldm.interop.part._towers import towers
from ldm.interop.tie import Tie, renamer, same

LETTERS = ("q", "k", "v")
LAYER = renamer(
    {"attn": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
)
BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(attn\.in_proj_weight|attn\.out_proj\.weight|mlp\.c_(?:fc|proj)\.weight)")


@dataclass(frozen=True)
class Module:
    """One module of theirs, as a part of one of ours.

    Args:
        name: of our module.
        tensor: ours that holds its weight.
        tie: how ours is made of theirs.
        part: which of theirs it is, from 0.
        start, end: the rows of ours that the tie is of; None: all.
    """

    name: str
    tensor: str
    tie: Tie
    part: int = 0
    start: int | None = None
    end: int | None = None

    def weight(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Ours."""
        return weights[self.tensor][self.start : self.end]

    def rows(self, weights: Mapping[str, Tensor]) -> list[int]:
        """How many rows each of theirs has, of which ours is made."""
        return [len(piece) for piece in self.tie.split(_shape(self.weight(weights)))]

    def shape(self, weights: Mapping[str, Tensor], whole: bool = False) -> tuple[int, ...]:
        """Of ours, if `whole`, or of this one of theirs, in our dimensions."""
        here = self.weight(weights)
        return tuple(here.shape) if whole else (self.rows(weights)[self.part], *here.shape[1:])


def _shape(x: Tensor) -> Tensor:
    return torch.empty(x.shape, device="meta")


def modules_of(bundle: Bundle) -> dict[str, Module]:
    """What a file may call each module of a model -> that module."""
    network, settings = network_of(bundle), network_of(bundle).settings(bundle)
    backbone = {n: x for n, x in bundle.backbone().items() if n.endswith(".weight") and x.ndim > 1}
    kind = bundle.recipe["prediction"]["_target_"].split(".")[-1]
    known: dict[str, Module] = {}
    for layout, ties in (
        ("diffusers", network.diffusers_ties(backbone, settings)),
        ("single", network.single_ties(backbone, settings, kind)),
    ):
        for ours, tie in ties.items():
            for i, theirs in enumerate(tie.theirs):
                name = theirs.removesuffix(".weight")
                module = Module(BACKBONE + ours.removesuffix(".weight"), BACKBONE + ours, tie, i)
                dotted = [f"{network.folder}.{name}", name, f"base_model.model.{name}"] if layout == "diffusers" else [name]
                for spelled in (f"lora_unet_{name.replace('.', '_')}", *(s for d in dotted for s in _old(d))):
                    known.setdefault(spelled, module)
    for theirs, module in _text(bundle):
        known.setdefault(theirs, module)
    return known


def _old(name: str) -> list[str]:
    """A name, and how diffusers' attention processors of 2023 spelled it."""
    found = re.fullmatch(r"(.+\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?", name)
    return [name, *([f"{found[1]}.processor.{found[2]}", f"{found[1]}.{found[2]}"] if found else [])]


def _text(bundle: Bundle) -> Iterator[tuple[str, Module]]:
    """The modules of the text towers, whose q, k and v are modules of their own here as there."""
    for i, place in enumerate(towers(bundle.recipe["condition"])):
        prefix = f"conditioner.embedders.{place.removeprefix('condition.')}.tower."
        there = ["text_encoder." if i == 0 else f"text_encoder_{i + 1}.", *(["base_model.model.", ""] if i == 0 else [])]
        kohya = ["lora_te_", "lora_te1_"] if i == 0 else [f"lora_te{i + 1}_"]
        for tensor in (name for name in bundle.weights if name.startswith(prefix)):
            found = BLOCK.fullmatch(tensor.removeprefix(prefix))
            for theirs, module in _of_block(found[1], found[2], prefix, tensor, bundle) if found else ():
                for spelled in (theirs, f"text_model.{theirs}"):
                    yield from ((f"{begin}{spelled}", module) for begin in there)
                    yield from ((f"{begin}{spelled.replace('.', '_')}", module) for begin in kohya)


def _of_block(number: str, leaf: str, prefix: str, tensor: str, bundle: Bundle) -> Iterator[tuple[str, Module]]:
    block, name = f"{prefix}transformer.resblocks.{number}.", f"encoder.layers.{number}."
    if not leaf.endswith("in_proj_weight"):
        part = leaf.removesuffix(".weight")
        yield name + LAYER(part), Module(block + part, tensor, same(""))
        return
    width = len(bundle.weights[tensor]) // 3
    for i, letter in enumerate(LETTERS):
        yield name + LAYER(f"attn.{letter}"), Module(f"{block}attn.{letter}", tensor, same(""), 0, i * width, (i + 1) * width)
