"""What a tensor of ours is called elsewhere, and how its numbers lie there; the one table serves both ways."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import Refusal

Weights = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tie:
    """One tensor of ours: the names it has elsewhere, theirs -> ours, and ours -> theirs."""

    theirs: tuple[str, ...]
    join: Callable[..., Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]


def same(name: str) -> Tie:
    """The same numbers in the same places."""
    return Tie((name,), lambda x: x, lambda x: (x,))


def kernel(name: str, dims: int) -> Tie:
    """A matrix of ours that is a convolution's kernel of size 1 over `dims` dimensions there."""
    return Tie((name,), lambda x: x.flatten(1), lambda x: (x[(..., *(None,) * dims)],))


def projection(name: str, matrix: bool) -> Tie:
    """A matrix of ours that is a matrix there, or a picture's kernel of size 1; either is read."""
    return Tie((name,), lambda x: x.flatten(1), lambda x: (x if matrix else x[..., None, None],))


def turned(name: str) -> Tie:
    """A matrix that lies transposed there."""
    return Tie((name,), lambda x: x.T, lambda x: (x.T.contiguous(),))


def stacked(*names: str) -> Tie:
    """Several of theirs, one below the other."""
    return Tie(names, lambda *parts: torch.cat(parts), lambda x: x.chunk(len(names)))


def repeated(*names: str) -> Tie:
    """One of ours that stands there several times.

    Raises:
        Refusal: what stands there differs.
    """

    def join(first: Tensor, *others: Tensor) -> Tensor:
        for name, x in zip(names[1:], others):
            if not torch.equal(first, x):
                raise Refusal(f"{name} differs from {names[0]}; in a published network they are the same.")
        return first

    return Tie(names, join, lambda x: tuple(x if i == 0 else x.clone() for i in range(len(names))))


def headwise(heads: int, *names: str) -> Tie:
    """Several of theirs, of which ours keeps each head's rows together."""

    def join(*parts: Tensor) -> Tensor:
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(0, 1) for part in x.unflatten(0, (heads, len(names), -1)).unbind(1))

    return Tie(names, join, split)


def renamer(table: Mapping[str, str]) -> Callable[[str], str]:
    """Replaces whole dotted pieces of a name, the longest first."""
    pieces = "|".join(re.escape(piece) for piece in sorted(table, key=len, reverse=True))
    pattern = re.compile(rf"(?<![^.])({pieces})(?![^.])")
    return lambda name: pattern.sub(lambda found: table[found[0]], name)


def check_whole(weights: Weights, shapes: Shapes, place: str) -> None:
    """Raises ValueError where tensors are missing, unknown, or of another shape."""
    wrong = [f"{name} is missing" for name in sorted(shapes.keys() - weights.keys())]
    wrong += [f"{name} is unknown" for name in sorted(weights.keys() - shapes.keys())]
    wrong += [
        f"{name} has the shape {tuple(weights[name].shape)}, not {tuple(shapes[name])}"
        for name in sorted(shapes.keys() & weights.keys())
        if tuple(weights[name].shape) != tuple(shapes[name])
    ]
    if wrong:
        raise Refusal(f"{place} does not fit its config: {'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}.")


def bring(ties: Mapping[str, Tie], weights: Weights, shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
    """Their tensors, by our names and in our shapes.

    Raises:
        Refusal: some are missing, or have another shape.
    """
    missing = [prefix + name for tie in ties.values() for name in tie.theirs if prefix + name not in weights]
    if missing:
        raise Refusal(f"{len(missing)} tensors are missing, such as {', '.join(missing[:3])}.")
    ours = {}
    for name, tie in ties.items():
        ours[name] = tie.join(*(weights[prefix + theirs] for theirs in tie.theirs))
        if _ends_in_ones(ours[name].shape, shapes[name]):
            ours[name] = ours[name].reshape(shapes[name])
        if tuple(ours[name].shape) != tuple(shapes[name]):
            found = [tuple(weights[prefix + theirs].shape) for theirs in tie.theirs]
            raise Refusal(f"{prefix}{tie.theirs[0]} has the shape {found[0]}; {tuple(shapes[name])} was wanted for {name}.")
    return ours


def _ends_in_ones(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a tensor, such as an old autoencoder's bias of (C, 1, 1), has places of size 1 too many."""
    return tuple(found[: len(wanted)]) == tuple(wanted) and all(n == 1 for n in found[len(wanted) :])


def give(ties: Mapping[str, Tie], ours: Weights, prefix: str = "") -> dict[str, Tensor]:
    """Our tensors, by their names and in their shapes."""
    theirs = {}
    for name, tie in ties.items():
        theirs |= {prefix + their: part for their, part in zip(tie.theirs, tie.split(ours[name]), strict=True)}
    return theirs


def taken(ties: Mapping[str, Tie], prefix: str = "") -> set[str]:
    """Their names that the ties use."""
    return {prefix + name for tie in ties.values() for name in tie.theirs}


def tied(names: Iterable[str], tie: Callable[[str], Tie]) -> dict[str, Tie]:
    """A tie for each of our names."""
    return {name: tie(name) for name in names}
