"""ControlNet: a copy of a U-Net's first half that follows a picture, beside the frozen whole (https://arxiv.org/abs/2302.05543).

What each stage of the copy says is added, through a convolution that is zero at first, to what the same stage of the U-Net
passes on to its second half. The control picture comes as maps behind the noisy latents (condition/hint.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.errors import Refusal
from ldm.files.process import first
from ldm.nn.layers import zero
from ldm.types import Cond

NET = re.compile(r"denoiser\.backbone\.nets\.[^.]+\.(.+)")
HINT = re.compile(r"conditioner\.embedders\.[^.]+\.(layers\.\d+\.(?:weight|bias))")


@runtime_checkable
class HalfAndHalf(Protocol):
    """A network of two halves, of which the second hears what each stage of the first says.

    It has the modules `encoder`, `middle`, `decoder` and `out`; isinstance of Python 3.12 and later sees no modules of an object.
    """

    skips: Sequence[int]
    width: int
    blocks: Sequence[nn.Module]

    def condition(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Any:
        """What each stage hears."""

    def down(self, x: Tensor, heard: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """The first half."""

    def up(self, h: Tensor, skips: Sequence[Tensor], heard: Any) -> Tensor:
        """The second half."""


class Control(nn.Module):
    """A copy of a U-Net's first half, and the convolutions through which it speaks.

    guess: the earlier a stage, the less it says, 0.1^(1 - i / n) for i = 0 .. n. pool: each says the same everywhere, its mean.
    """

    def __init__(self, base: Any, guess: bool = False, pool: bool = False) -> None:
        super().__init__()
        self.copy = deepcopy(base, {id(base.decoder): nn.ModuleList(), id(base.out): nn.Identity()})
        self.zeros = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for width in base.skips)
        self.zero_middle = zero(nn.Conv2d(base.skips[-1], base.skips[-1], 1))
        self.guess, self.pool = guess, pool

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of the copy."""
        return list(self.copy.blocks)

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond, hint: Tensor) -> list[Tensor]:
        """x: (B, C, H, W), noise_level: (B), hint: (B, W + 1, H, W), features and strength -> residuals, the middle's last."""
        features, strength = hint[:, :-1], hint[:, -1:]
        heard = self.copy.condition(x, noise_level, cond)
        enter, *stages = self.copy.encoder
        h = enter(x[:, : enter[0].in_channels], *heard) + features  # of an inpainting base others' hear the noisy latents alone
        said = [h]
        for stage in (*stages, self.copy.middle):
            h = stage(h, *heard)
            said.append(h)
        return [
            self._mean(layer(h)) * scale * interpolate(strength, h.shape[2:], mode="area")
            for layer, h, scale in zip((*self.zeros, self.zero_middle), said, self._scales(), strict=True)
        ]

    def _mean(self, h: Tensor) -> Tensor:
        return h.mean(dim=(2, 3), keepdim=True) if self.pool else h

    def _scales(self) -> list[float]:
        n = len(self.zeros)
        return [0.1 ** (1 - i / n) if self.guess and not self.pool else 1.0 for i in range(n + 1)]


class Controlled(nn.Module):
    """A U-Net and the ControlNets around it, by name; what several say is added.

    x brings, behind the base's channels, the features and the strength of each one's hint, in their order.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.nets = base, nn.ModuleDict()

    @property
    def blocks(self) -> list[nn.Module]:
        """The base's, then each ControlNet's."""
        return [*self.base.blocks, *(block for net in self.nets.values() for block in net.blocks)]

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C + C' + hints, H, W), noise_level: (B) -> (B, C, H, W)."""
        each, count = self.base.width + 1, len(self.nets)
        x, *hints = x.split([x.shape[1] - count * each, *[each] * count], dim=1)
        if self.training:  # the hints' gradient came along with the concatenation, and nothing before x is trained
            x = x.detach()
        heard = self.base.condition(x, noise_level, cond)
        h, skips = self.base.down(x, heard)
        for net, hint in zip(self.nets.values(), hints):
            *residuals, last = net(x, noise_level, cond, hint)
            h, skips = h + last, [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        return self.base.up(h, skips, heard)


class ControlNet:
    """A copy of the U-Net's first half that follows a control picture.

    Args:
        hint: makes the condition that reads the control picture; it is told `autoencoder`, `width` and `key`.
        name: of the condition, and the field of the shards, or of a request, that holds the picture.
        guess: the earlier a stage, the less it says, and the null condition hears nothing of it: for pictures without a caption.
        pool: what it says is averaged over the picture, as the published one of shuffled pictures has it; as `guess` in the null.

    Raises:
        Refusal: a name that is no word.
    """

    wraps = True

    def __init__(self, hint: Callable[..., nn.Module], name: str = "control", guess: bool = False, pool: bool = False) -> None:
        if not str(name).isidentifier():
            raise Refusal(f"adapter.controlnet.name={name}: wanted a word, such as edges, that names a field.")
        self.hint, self.name, self.guess, self.pool = hint, name, guess, pool

    def owns(self, name: str) -> bool:
        """By its beginning, whatever the ControlNet was called when it was trained."""
        return NET.fullmatch(name) is not None or HINT.fullmatch(name) is not None

    def attach(self, model: Any) -> list[str]:
        """Puts a copy of the first half beside a U-Net, which says nothing yet -> the names of what is trained.

        Raises:
            Refusal: the network has no such half, or the model such a condition already.
        """
        self._check(model)
        self._join(model, Control(_base_of(model), self.guess, self.pool), self._hint(model))
        names = [name for name, _ in model.named_parameters() if self.owns(name)]
        if first():
            count = sum(model.get_parameter(name).numel() for name in names)
            print(f"adapter.controlnet: {count:,} numbers follow the field {self.name}", flush=True)
        return names

    def apply(self, model: Any, tensors: Mapping[str, Tensor], strength: float, base: Mapping[str, Tensor]) -> None:
        """Puts a trained one around the network; `strength` is meant where a request says none.

        Raises:
            Refusal: the network has no such half, or another one; or the model has such a condition already.
        """
        self._check(model)
        net, hint = Control(_base_of(model), self.guess, self.pool), self._hint(model)
        network = {match[1]: x for name, x in tensors.items() if (match := NET.fullmatch(name))}
        _enter(net, network)
        for module, there in ((net, network), (hint, {match[1]: x for n, x in tensors.items() if (match := HINT.fullmatch(n))})):
            _check_shapes(module, there)
            module.load_state_dict(there, assign=True)
        hint.strength = strength
        if self.guess or self.pool:
            hint.rate = hint.rate or 1.0  # dropped in the null
        self._join(model, net.requires_grad_(False).eval(), hint.requires_grad_(False).eval())

    def _check(self, model: Any) -> None:
        base = _base_of(model)
        if not isinstance(base, HalfAndHalf):
            raise Refusal(f"a ControlNet needs an encoder with skips; this backbone is a {type(base).__name__}.")
        if self.name in model.conditioner.embedders:
            raise Refusal(
                f"adapter.controlnet.name={self.name}: the model has a condition of that name "
                f"({list(model.conditioner.embedders)}); give it another, or NAME= in adapters=."
            )

    def _hint(self, model: Any) -> nn.Module:
        return self.hint(autoencoder=model.autoencoder, width=_base_of(model).width, key=self.name)

    def _join(self, model: Any, net: Control, hint: nn.Module) -> None:
        backbone = model.denoiser.backbone
        controlled = backbone if isinstance(backbone, Controlled) else Controlled(backbone)
        controlled.nets[self.name] = net
        model.denoiser.backbone = controlled
        model.conditioner.add(self.name, hint)


def _base_of(model: Any) -> Any:
    backbone = model.denoiser.backbone
    return backbone.base if isinstance(backbone, Controlled) else backbone


def _enter(net: Control, tensors: Mapping[str, Tensor]) -> None:
    """Gives a ControlNet for an inpainting base as many channels as it was trained with: perhaps the noisy latents' alone."""
    enter, weight = net.copy.encoder[0][0], tensors.get("copy.encoder.0.0.weight")
    if weight is not None and weight.ndim == 4 and weight.shape[1] < enter.in_channels and len(weight) == enter.out_channels:
        net.copy.encoder[0][0] = nn.Conv2d(weight.shape[1], enter.out_channels, 3, padding=1, device="meta")


def _check_shapes(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = module.state_dict()
    if lost := sorted(state.keys() ^ tensors.keys()):
        where = "is not there" if lost[0] in state else "is of nothing here"
        raise Refusal(f"{len(lost)} tensors do not fit this U-Net: {lost[0]} {where}; it is a ControlNet of another.")
    for name, x in tensors.items():
        if x.shape != state[name].shape:
            raise Refusal(
                f"{name} is {tuple(x.shape)} in the ControlNet and {tuple(state[name].shape)} in this U-Net; it is of another."
            )
