"""Boxes and what is in them, as tokens: layout-to-image (https://arxiv.org/abs/2112.10752, section 4.3.2)."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition._files import numbered, painted, palette
from ldm.embedder import Condition, Input
from ldm.errors import NotFound, Refusal
from ldm.types import Batch, Cond, Draw, Widths

CUT = ("target_height", "target_width", "crop_top", "crop_left", "mirrored")  # what batches say of their pictures
Box = Sequence[float]  # class, left, top, right, bottom; the last four in [0, 1]


class Layout(Condition):
    """Up to `most` boxes -> one token each: its class, and its four edges on a grid of `bins`, read by a small transformer.

    A box is [class, left, top, right, bottom], the edges in [0, 1] of the picture; the field `boxes` has a list of them for each
    sample. Where the batch lacks it, they are the records' `boxes`, cut and mirrored as the batch says that its pictures were
    (middle squares, where it has none); or the extents of the labels of a `map`, one box for each label but 0.

    Args:
        classes: how many there are.
        width, depth, heads: features of a token, blocks, and heads of the transformer.
        bins: places of an edge, over the picture's side.
        most: boxes of a picture, at most; of more, the largest are told.
        least: the share of a map that a label must cover to become a box.
        rate: the share of samples for which the boxes are dropped in training, in [0, 1]; then there is none.
    """

    def __init__(
        self,
        classes: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        bins: int = 32,
        most: int = 8,
        least: float = 0.02,
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.key, self.rate, self.widths = "boxes", rate, Widths(tokens=width)
        self.classes, self.bins, self.most, self.least = classes, bins, most, least
        self.kind = nn.Embedding(classes, width)
        self.edges = nn.ModuleList(nn.Embedding(bins, width) for _ in range(4))
        self.nothing = nn.Parameter(torch.randn(width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, value: Sequence[Sequence[Box]], drop: Tensor) -> Cond:
        """value: B lists of boxes, drop: (B) bool -> tokens: (B, 1 + most, D) and their mask; the first stands for the whole.

        Raises:
            Refusal: a class or an edge out of range.
        """
        device = self.nothing.device
        boxes = torch.zeros(len(value), self.most, 5)
        mask = torch.zeros(len(value), self.most, dtype=torch.bool)
        for i, row in enumerate(value):
            chosen = [] if drop[i] else sorted(map(self._checked, row), key=_area, reverse=True)[: self.most]
            if chosen:
                boxes[i, : len(chosen)], mask[i, : len(chosen)] = torch.tensor(chosen), True
        mask = torch.cat((torch.ones(len(mask), 1, dtype=torch.bool), mask), dim=1)
        boxes, mask = (x.to(device, non_blocking=True) for x in (boxes, mask))
        places = (boxes[..., 1:] * self.bins).long().clamp(max=self.bins - 1)
        tokens = self.kind(boxes[..., 0].long()) + sum(table(places[..., i]) for i, table in enumerate(self.edges))
        tokens = torch.cat((self.nothing.expand(len(tokens), 1, -1), tokens), dim=1)
        return Cond(tokens=self.transformer(tokens, src_key_padding_mask=~mask), mask=mask)

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """Boxes, where the batch has none, from its records or its maps.

        Raises:
            Refusal: a record without boxes, or with others than in the class' docstring.
        """
        if self.key in batch:
            return {}
        if "json" in batch and ("map" not in batch or any("boxes" in record for record in batch["json"])):
            records = [{**record, "boxes": self._boxes(record)} for record in batch["json"]]
            cuts = zip(*(batch[field].tolist() for field in CUT)) if CUT[0] in batch else [()] * len(records)
            return {self.key: [in_the_cut(record, *cut) for record, cut in zip(records, cuts)]}
        return {self.key: [boxes_of(labels, self.least) for labels in batch["map"].cpu()]} if "map" in batch else {}

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[list[Box]]:
        """One list of boxes, a list of such lists, or JSON files of either -> N lists of boxes.

        Raises:
            Refusal: something else. NotFound: no such file.
        """
        lists = [_from_file(field, a) for a in values] if values and isinstance(values[0], str) else [values]
        rows = [row for boxes in lists for row in (boxes if _is_of_many(boxes) else [boxes])]
        return [[self._checked(box) for box in row] for row in rows]

    def input(self, field: str) -> Input:
        """Boxes that are drawn."""
        return Input("boxes", numbered(self.classes), palette(self.classes))

    def show(self, value: Sequence[Sequence[Box]], side: int = 64) -> Tensor:
        """value: as in `forward` -> (B, 3, side, side) in [-1, 1], each box in its class' colour, small ones above large ones."""
        labels = torch.zeros(len(value), side, side, dtype=torch.int64)
        for page, row in zip(labels, value):
            for kind, *edges in sorted(row, key=_area, reverse=True):
                left, top, right, bottom = (round(edge * side) for edge in edges)
                page[top:bottom, left:right] = int(kind)
        return painted(labels, self.classes)

    def _boxes(self, record: Mapping[str, Any]) -> list[list[float]]:
        if not isinstance(record.get("boxes"), list):
            raise Refusal(
                "Condition 'layout' reads `boxes` in the json of each sample, a list of [class, left, top, right, bottom], and "
                f"found {record.get('boxes')!r} in one with {sorted(record)}. Write [] where there are none."
            )
        return [self._checked(box, flat=True) for box in record["boxes"]]

    def _checked(self, box: Any, flat: bool = False) -> list[float]:
        """The box, with edges that lie outside by a rounding error brought inside; `flat`: it may have no area."""
        numbers = isinstance(box, Sequence) and len(box) == 5 and all(isinstance(v, int | float) for v in box)
        kind, *edges = box if numbers else [-1] * 5
        left, top, right, bottom = (min(max(edge, 0.0), 1.0) if -1e-3 <= edge <= 1 + 1e-3 else math.nan for edge in edges)
        ordered = (left < right and top < bottom) or (flat and left <= right and top <= bottom)
        if not (0 <= kind < self.classes and kind == int(kind) and ordered):
            raise Refusal(
                f"Found the box {box}; wanted [class, left, top, right, bottom] with a class from 0 to {self.classes - 1} "
                "(condition.layout.classes=...) and edges in [0, 1] of the picture, left < right, top < bottom."
            )
        return [float(kind), left, top, right, bottom]


def _from_file(field: str, path: str) -> list[Any]:
    if not Path(path).is_file():
        raise NotFound(f"ask.{field}={path}: there is no such file; wanted [[class, left, top, right, bottom], ...].")
    try:
        boxes = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(f"ask.{field}={path} is no JSON: {error}") from error
    return boxes if isinstance(boxes, list) else [boxes]


def _is_of_many(boxes: Sequence[Any]) -> bool:
    return bool(boxes) and all(isinstance(row, Sequence) and all(isinstance(box, Sequence) for box in row) for row in boxes)


def in_the_cut(
    record: Mapping[str, Any],
    height: int = 1,
    width: int = 1,
    top: int | None = None,
    left: int | None = None,
    mirrored: bool = False,
) -> list[list[float]]:
    """-> the record's boxes as they lie in the cut, in [0, 1] of it; what lies outside goes.

    Args:
        record: its `boxes` have edges in [0, 1] of the original picture, whose `width` and `height` in pixels stand beside them.
        height, width: of the cut, the largest part of that shape, after it is scaled to this size; also the original size, if
            the record has none.
        top, left: of the cut in the scaled picture, in pixels; None: the middle.
        mirrored: whether the cut is mirrored.
    """
    sides = record.get("width", width), record.get("height", height)
    scale = min(side / cut for side, cut in zip(sides, (width, height)))
    inside = []
    for kind, *edges in record["boxes"]:
        spans = []
        for axis, (side, cut, first) in enumerate(zip(sides, (width, height), (left, top))):
            first = (side / scale - cut) / 2 if first is None else first
            spans.append([min(max((edges[i] * side / scale - first) / cut, 0.0), 1.0) for i in (axis, axis + 2)])
        (x0, x1), (y0, y1) = spans
        x0, x1 = (1 - x1, 1 - x0) if mirrored else (x0, x1)
        inside += [[kind, x0, y0, x1, y1]] if x0 < x1 and y0 < y1 else []
    return inside


def boxes_of(labels: Tensor, least: float = 0.02) -> list[list[float]]:
    """labels: (h, w) integers -> [class, left, top, right, bottom] of each label but 0 that covers at least `least`."""
    height, width = labels.shape
    boxes = []
    for label in labels.unique().tolist():
        rows, columns = (labels == label).nonzero(as_tuple=True)
        if label and len(rows) >= least * labels.numel():
            left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            boxes.append([float(label), left.item() / width, top.item() / height, right.item() / width, bottom.item() / height])
    return boxes


def _area(box: Box) -> float:
    return (box[3] - box[1]) * (box[4] - box[2])
