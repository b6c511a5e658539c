"""Width that transfers, muP: what a small network learns best by, a wide one does too (https://arxiv.org/abs/2203.03466).

By its table 3, with r the number of a weight's inputs over that of the base network's, under Adam:

    weights from width to width   initial size ~ 1 / sqrt(r)   rate ~ 1 / r
    from width to a fixed number  initial size ~ 1 / r         rate ~ 1 / r
    from a fixed number to width, biases, gains, tables        as in the base network

That these rules are those of DiT, PixArt and MMDiT as well is shown in https://arxiv.org/abs/2505.15270.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ldm.errors import Refusal
from ldm.model import LatentModel
from ldm.types import Widths

PREFIX = "model.denoiser.backbone."


class MuP:
    """Compares a model's backbone with the same one, smaller.

    Args:
        backbone: makes the model's backbone, given channels and widths.
        small: its settings in the base network, such as {width: 64}; all others are the model's own, but for the number of heads
            of attention, which are as wide as the model's.

    Raises:
        Refusal: heads of attention are not as wide as the base network's.
    """

    def __init__(self, backbone: Callable[..., nn.Module], small: Mapping[str, Any]) -> None:
        self.backbone, self.small = backbone, dict(small)

    def start(self, model: LatentModel) -> None:
        """Gives each new weight of a model's backbone the size that it has in the base network, times what the rules say."""
        small, net = self._small(model), model.denoiser.backbone
        check_heads(net, small)
        with torch.no_grad():
            for _, weight, other in pairs(net, small):
                size, wanted = _size(weight), _size(other)
                if weight.is_meta or weight.shape == other.shape or not size or not wanted:
                    continue
                r = inputs(weight, other)
                narrow = weight.shape[0] == other.shape[0]
                weight.mul_(wanted / size * (1 / r if narrow else r**-0.5))

    def scales(self, model: LatentModel) -> dict[str, float]:
        """By the stage's names, what the rate of a weight is multiplied by, where that is not 1."""
        ratios = {name: inputs(weight, other) for name, weight, other in pairs(model.denoiser.backbone, self._small(model))}
        return {f"{PREFIX}{name}.weight": 1 / r for name, r in ratios.items() if r != 1}

    def _small(self, model: LatentModel) -> nn.Module:
        widths = model.conditioner.widths + Widths(vector=model.denoiser.span)
        settings = {**heads_of(self.backbone, self.small), **self.small}
        with torch.random.fork_rng(devices=[]):
            return self.backbone(**settings, channels=model.autoencoder.channels, widths=widths)


def heads_of(backbone: Callable[..., nn.Module], small: Mapping[str, Any]) -> dict[str, int]:
    """The number of heads in the base network that are as wide as the model's, where the backbone is told a number of them."""
    settings = backbone.keywords if isinstance(backbone, partial) else {}
    width, heads = settings.get("width"), settings.get("heads")
    if not width or not heads or settings.get("head_width") is not None or "width" not in small:
        return {}
    count = heads * small["width"] / width
    if count % 1:
        raise Refusal(
            f"parametrization=mup: the {heads} heads of backbone.width={width} are {count:g} of that width in the base network, "
            f"parametrization.small.width={small['width']}; choose a multiple of {width / heads:g}, or backbone.head_width."
        )
    return {"heads": int(count)}


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises Refusal where the rules are of another kind of optimizer."""
    if not isinstance(optimizer, Adam | AdamW):
        raise Refusal(f"parametrization=mup has the rules of Adam: optimizer=adamw (found {type(optimizer).__name__}).")


def pairs(net: nn.Module, small: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The weights of linear layers and convolutions of a network, by the layer's name, and those of the base network."""
    others = dict(small.named_modules())
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module.weight, others[name].weight


def inputs(weight: Tensor, other: Tensor) -> float:
    """How many times as many inputs a weight has as another."""
    return weight.shape[1:].numel() / other.shape[1:].numel()


def check_heads(net: nn.Module, small: nn.Module) -> None:
    """Raises Refusal where attention adds up over wider heads than in the base network, by 1 / sqrt(width) of them."""
    others = dict(small.named_modules())
    for name, module in net.named_modules():
        wide, narrow = head_width(module), head_width(others[name])
        if wide != narrow:
            raise Refusal(
                f"parametrization=mup: heads of attention are {wide:g} wide, and {narrow:g} in the base network ({name}). Let "
                "their number grow with the width: backbone.heads and parametrization.small.heads, or backbone.head_width."
            )


def head_width(module: nn.Module) -> float | None:
    """Features of a head, of a layer with `heads`; None of others."""
    heads = vars(module).get("heads")
    first = next((layer for layer in module.children() if isinstance(layer, nn.Linear)), None)
    return first.in_features / heads if isinstance(heads, int) and first is not None else None


def _size(weight: Tensor) -> float:
    return 0.0 if weight.is_meta else weight.detach().square().mean().sqrt().item()
