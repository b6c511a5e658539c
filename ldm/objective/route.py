"""Fewer patches in a transformer's middle blocks in training: TREAD (https://arxiv.org/abs/2501.04765), around any objective.

Of each sample a random share of the patches waits before block `first` and comes back, as it was, behind block `last`. A backbone
with `fuse` joins instead what enters the first of these blocks with what leaves the last, where a learnt token stands for those
that did not go: SPRINT (https://arxiv.org/abs/2510.21986). Drawing, validation and other models see all patches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ldm.errors import Refusal
from ldm.nn.route import Route, Routed
from ldm.objective._around import Around
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Draw, InTraining, Objective


class Routing(Around):
    """Another objective, while some patches take the short way.

    Args:
        rate: the share of the patches that wait, in [0, 1); 0 leaves all as it is.
        first, last: blocks, 1 is the first and -1 the last; None: those of `backbone.fuse`, else 3 and -4.
        until: the step from which on all patches go (SPRINT ends so); None: never.
        of: makes the other objective.
        **parts: time, weight, noise and distance, of the other objective.

    Raises:
        Refusal: a share outside [0, 1), a backbone whose blocks take no fewer patches, or no such blocks.
    """

    def __init__(
        self,
        rate: float = 0.5,
        first: int | None = None,
        last: int | None = None,
        until: int | None = None,
        of: Callable[..., Objective] = Regression,
        **parts: Any,
    ) -> None:
        super().__init__(of, **parts)
        check_rate(rate)
        self.rate, self.first, self.last, self.until = rate, first, last, until

    def forward(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """x: (B, C, H, W) clean latents -> what `of` says."""
        backbone = model.denoiser.backbone
        first, last = blocks_of(backbone, self.first, self.last)
        if not self.training or not self.rate or (self.until is not None and draw.step >= self.until):
            return self.of(model, batch, x, cond, draw)
        with routed(backbone, Route(first, last, kept_of(backbone, x, draw, self.rate))):
            return self.of(model, batch, x, cond, draw)


@contextmanager
def routed(backbone: Routed, route: Route) -> Iterator[None]:
    """Within it, that is the way of the patches."""
    backbone.route = route
    try:
        yield
    finally:
        backbone.route = None


def kept_of(backbone: Routed, x: Tensor, draw: Draw, rate: float) -> Tensor:
    """x: (B, C, H, W) -> places of the patches that go, ascending: (B, K), K = round((1 - rate) N), on the CPU."""
    count = x.shape[2] // backbone.patch * (x.shape[3] // backbone.patch)
    some = max(1, round((1 - rate) * count))
    return draw.uniform("route", (count,)).argsort(dim=1)[:, :some].sort(dim=1).values


def blocks_of(backbone: Any, first: int | None, last: int | None) -> tuple[int, int]:
    """Blocks as they are named, perhaps from the end -> their numbers, 1 to the depth.

    Raises:
        Refusal: they are none, or the backbone knows no such ways.
    """
    if not isinstance(backbone, Routed):
        raise Refusal(
            f"objective=route leaves patches out of a transformer's blocks (backbone=dit); found {type(backbone).__name__}."
        )
    depth = backbone.depth
    usual = backbone.fuse or (3, -4)
    wanted = [given if given is not None else other for given, other in zip((first, last), usual)]
    one, two = (block + depth + 1 if block < 0 else block for block in wanted)
    if not 1 <= one <= two <= depth:
        raise Refusal(
            f"objective.first={wanted[0]} objective.last={wanted[1]}: wanted two of its {depth} blocks, 1 to {depth} or "
            f"-1 to -{depth} from the end, in their order."
        )
    if backbone.fuse and (one, two) != tuple(backbone.fuse):
        raise Refusal(
            f"objective.first={one} objective.last={two}: the backbone joins other blocks, backbone.fuse={list(backbone.fuse)}."
        )
    return one, two


def check_rate(rate: float) -> None:
    """Raises Refusal where that is no share of patches that may wait."""
    if not 0 <= rate < 1:
        raise Refusal(f"objective.rate={rate}: the share of patches that are left out is at least 0 and below 1.")
