"""LoRA: low-rank updates of weights (https://arxiv.org/abs/2106.09685), W + alpha / rank B A, and DoRA (2402.09353).

Trained by PEFT beside frozen weights; to draw, added to them, which needs no PEFT and costs nothing a step. A run's tensors
are `<module>.lora_A.default.weight` (rank, in), `lora_B` (out, rank), for DoRA `lora_magnitude_vector` (out), and, where the
scale is not the setting's, `<module>.lora_alpha` (). A text tower's q, k and v are modules of their own (nn/attention.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.files.process import first
from ldm.nn.attention import Split, split_attention

ATTENTION = r"\.(?:attend\w*|attn|again)\.(?:q|k|v|kv|qkv|out|out_proj)|\.qkv"
TRANSFORMERS = (
    rf"{ATTENTION}|\.into|\.blocks\.\d+\.out|\.proj_in|\.proj_out|\.feed\.(?:wide|out)|\.mlp\.(?:c_fc|c_proj)|\.(?:wide|narrow)"
)
# Of our names, from their ends.
TARGETS = {
    "attention": ATTENTION,
    "transformers": TRANSFORMERS,
    "all": rf"{TRANSFORMERS}|\.conv_in|\.conv_out|\.tell\.told|\.skip|\.modulate|\.(?:level|vector)\.\d+",
}
BACKBONE, TEXT = "denoiser.backbone.", "conditioner.embedders."
PLAIN = (nn.Linear.__init__, nn.Conv2d.__init__)  # layers that PEFT can make smaller ones of
NAME = re.compile(r"(.+)\.(?:(lora_A|lora_B|lora_magnitude_vector)\.default\.weight|(lora_alpha))")


@dataclass(frozen=True)
class Update:
    """What one file says of one module.

    down: (rank, in, ...), up: (out, rank, ...); scale: alpha / rank; magnitude: DoRA's, (out) or, of each input column, (1, in).
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """weight: (out, in, ...), before any adapter, float64 -> what is added to it at strength 1, as float64."""
        added = (self.up.double().flatten(1) @ self.down.double().flatten(1)).reshape(weight.shape) * self.scale
        if self.magnitude is None:
            return added
        whole, axis = weight + added, int(self.magnitude.ndim == 2)
        norm = torch.linalg.vector_norm(whole, dim=[i for i in range(whole.ndim) if i != axis], keepdim=True)
        return self.magnitude.double().reshape(norm.shape) * whole / norm - weight


class LoRA:
    """Low-rank updates of a model's matrices and kernels.

    Args:
        rank: of each update, 1 or more.
        alpha: an update counts alpha / rank times; None is the rank, so that it counts once.
        targets: which modules: `attention` (queries, keys, values and what leaves them), `transformers` (also feed-forwards and
            the projections around them), `all` (also residual blocks and how they are told the noise level), or a regular
            expression that is searched for in names such as denoiser.backbone.middle.1.blocks.0.attend_self.q.
        text: whether the text towers are trained as well, as far as they are read with a gradient: not a language model, nor
            what lies behind the last layer that is read.
        dora: whether each row's length is trained apart from its direction.

    Raises:
        Refusal: a rank or alpha that makes nothing.
    """

    def __init__(
        self, rank: int = 8, alpha: float | None = None, targets: str = "attention", text: bool = False, dora: bool = False
    ) -> None:
        if rank < 1 or alpha == 0:
            raise Refusal(f"adapter.lora.rank={rank} adapter.lora.alpha={alpha} would make it nothing.")
        self.rank, self.alpha, self.targets, self.text, self.dora = rank, alpha, targets, text, dora

    def owns(self, name: str) -> bool:
        """By the end of its name."""
        return NAME.fullmatch(name) is not None

    def attach(self, model: nn.Module) -> list[str]:
        """Wraps the chosen modules in PEFT's layers, whose update is zero at first -> the names of the factors.

        Raises:
            Refusal: PEFT is missing; nothing is chosen, or something that PEFT cannot wrap.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise Refusal(
                f"adapter=[lora] trains by PEFT ({error}): pip install 'ldm[lora]'. Drawing with a LoRA needs none."
            ) from error
        chosen = self.chosen(model)
        settings = {"r": self.rank, "lora_alpha": self.rank if self.alpha is None else self.alpha, "use_dora": self.dora}
        inject_adapter_in_model(LoraConfig(target_modules="|".join(map(re.escape, chosen)), **settings), model)
        for name in chosen:  # no copy of a layer's input in float32 under autocast
            model.get_submodule(name).cast_input_dtype_enabled = False
        names = [name for name, _ in model.named_parameters() if self.owns(name)]
        if first():
            count = sum(model.get_parameter(name).numel() for name in names)
            print(f"adapter.lora: {len(chosen)} modules, {count:,} numbers ({_kinds(chosen)})", flush=True)
        return names

    def chosen(self, model: nn.Module) -> list[str]:
        """The modules that are trained; with `text`, the towers' attention is split into its matrices.

        Raises:
            Refusal: nothing is chosen, or something that PEFT cannot wrap.
        """
        if self.text:
            split_attention(model.get_submodule(TEXT.rstrip(".")))
        places = (BACKBONE, TEXT) if self.text else (BACKBONE,)
        layers = {n: m for n, m in model.named_modules() if n.startswith(places) and isinstance(m, nn.Linear | nn.Conv2d)}
        pattern = rf"(?:{TARGETS[self.targets]})\Z" if self.targets in TARGETS else self.targets
        unreached = tuple(f"{TEXT}{n}.{part}." for n, e in model.conditioner.embedders.items() for part in e.unreached)
        names = [name for name in layers if re.search(pattern, name) and not name.startswith(unreached)]
        if self.text and not any(name.startswith(TEXT) for name in names):
            kinds = ", ".join(type(e).__name__ for e in model.conditioner.embedders.values()) or "nothing"
            raise Refusal(
                f"adapter.lora.text=true, but no text tower is run here with a gradient (the model is told by {kinds}): "
                "condition=[text], not cached_text or a language model, or adapter.lora.text=false."
            )
        if not names:
            raise Refusal(
                f"adapter.lora.targets={self.targets} matches none of the {len(layers)} modules; they are named like "
                f"{', '.join(list(layers)[1:4])}. There are: {', '.join(TARGETS)}, or a regular expression."
            )
        resizing = [name for name in names if type(layers[name]).__init__ not in PLAIN]
        if resizing:
            raise Refusal(f"adapter.lora.targets={self.targets}: {resizing[0]} resizes inside; PEFT cannot wrap it.")
        if self.text and unreached and first():
            left = ", ".join(part.rstrip(".") for part in unreached)
            print(f"adapter.lora: without {left}: no gradient reaches it", flush=True)
        return names

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor], strength: float, base: Mapping[str, Tensor]) -> None:
        """Adds strength x each update to the weights.

        Raises:
            Refusal: an update of another shape, or of nothing here.
        """
        for name, x in self.merged(tensors, strength, base, base | {n: p.detach() for n, p in model.named_parameters()}).items():
            model.get_parameter(name).data = x

    def merged(
        self, tensors: Mapping[str, Tensor], strength: float, base: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weights that change, each a new tensor, summed in float64.

        Args:
            base: the weights before any adapter, by name. present: as they are now, with others' updates.

        Raises:
            Refusal: an update of another shape, or of nothing here.
        """
        made: dict[str, Tensor] = {}
        for name, update in self.updates(tensors).items():
            place = place_of(name, base)
            if place is None:
                raise Refusal(f"{name} is updated, and there is no such module here: the LoRA is of another model.")
            weight = base[place.tensor][place.rows]
            there = (len(update.up), *update.down.shape[1:])
            if (there[0], update.down[0].numel()) != (weight.shape[0], weight[0].numel()):
                raise Refusal(f"{name} is {there} in the LoRA and {tuple(weight.shape)} here; it is of another model.")
            if strength:
                whole = made.get(place.tensor, present[place.tensor]).to(torch.float64, copy=True)
                whole[place.rows] += strength * update.of(weight.double())
                made[place.tensor] = whole.to(weight.dtype)
        return made

    def updates(self, tensors: Mapping[str, Tensor]) -> dict[str, Update]:
        """Tensors by the model's names -> updates by module.

        Raises:
            Refusal: one factor without the other.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        for name, x in tensors.items():
            module, factor, alpha = NAME.fullmatch(name).groups()
            parts.setdefault(module, {})[factor or alpha] = x
        made = {}
        for module, factors in parts.items():
            if missing := [factor for factor in ("lora_A", "lora_B") if factor not in factors]:
                raise Refusal(f"{module}: {missing[0]} is missing.")
            rank = len(factors["lora_A"])
            alpha = float(factors.get("lora_alpha", rank if self.alpha is None else self.alpha))
            made[module] = Update(factors["lora_A"], factors["lora_B"], alpha / rank, factors.get("lora_magnitude_vector"))
        return made


@dataclass(frozen=True)
class Place:
    """Where a module's weight lies: a tensor, and the rows of it."""

    tensor: str
    rows: slice


def place_of(module: str, weights: Mapping[str, Any]) -> Place | None:
    """The weight of a module, or of a part of an attention whose matrices are one, among tensors by name; None: there is none."""
    if f"{module}.weight" in weights:
        return Place(f"{module}.weight", slice(None))
    owner, _, part = module.rpartition(".")
    stacked = f"{owner}.in_proj_weight"
    if part not in Split.PARTS or stacked not in weights:
        return None
    width = len(weights[stacked]) // len(Split.PARTS)
    start = Split.PARTS.index(part) * width
    return Place(stacked, slice(start, start + width))


def _kinds(names: Sequence[str]) -> str:
    """How many of each kind of module, by the ends of their names."""
    ends = [".".join(name.split(".")[-2:]) if not name.split(".")[-2].isdigit() else name.split(".")[-1] for name in names]
    return ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
