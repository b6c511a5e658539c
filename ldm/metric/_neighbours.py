"""Balls around pictures, out to one of their neighbours: what precision, recall, density and coverage are counted by."""

import torch
from torch import Tensor

from ldm.measure import Reference, Rows

CHUNK = 1000  # rows of a block of distances


def both(rows: Rows, reference: Reference, share: str) -> tuple[Tensor, Tensor, str | None]:
    """-> features of the drawings (N, D) and of the real pictures (M, D), and where N and M differ a note for `share`."""
    drawn, real = rows["features"].float(), reference.rows()["features"].float()
    if len(drawn) == len(real):
        return drawn, real, None
    return (
        drawn,
        real,
        f"{len(drawn)} drawings against {len(real)} real pictures: {share} is comparable only between equal counts.",
    )


def radii(x: Tensor, k: int) -> Tensor:
    """x: (N, D) -> (N), each one's distance to its k-th neighbour among the others."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(CHUNK)])


def within(points: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """points: (M, D), x: (N, D), radius: (N) -> (M) bool: does it lie in the ball of any x?"""
    return torch.cat([(torch.cdist(part, x) <= radius).any(dim=1) for part in points.split(CHUNK)])
