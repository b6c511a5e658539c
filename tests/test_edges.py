"""Canny's edges of what is known, and how well a drawing keeps them."""

import pytest
import torch

from ldm.edges import drawn, edges
from ldm.errors import Refusal
from ldm.metric.edge_f1 import EdgeF1


def square():
    picture = torch.full((1, 3, 24, 24), -1.0)
    picture[..., 6:18, 6:18] = 1
    return picture


def test_edges_of_a_square():
    """A closed line, a pixel wide, where black meets white, the same from either side and turned with the picture; a flat
    picture, or one whose steps are weak, has none."""
    found = edges(square())[0, 0]
    assert not found[9:15, 9:15].any() and not found[:4].any() and not found[20:].any()
    assert (found[9:15].sum(1) == 2).all() and (found[:, 9:15].sum(0) == 2).all()
    assert found[12].nonzero().flatten().tolist() in ([5, 17], [5, 18], [6, 17], [6, 18])
    assert torch.equal(edges(-square()), edges(square()))
    assert not edges(torch.full((1, 3, 16, 16), 0.3)).any() and not edges(square() * 0.05).any()


def test_weak_edges_are_kept_where_they_touch_strong_ones():
    step = torch.full((1, 3, 16, 32), -1.0)
    step[..., 8:, :] = torch.linspace(-0.9, 1, 32)  # from weak to strong along one line
    alone = step.clone()
    alone[..., 12:] = alone[..., 11:12]  # its weak end
    assert edges(step).sum() > edges(step, low=0.8).sum() and not edges(alone, high=3.0).any()


def test_edge_f1_is_1_of_itself_falls_with_distance_and_wants_a_hint():
    picture, metric = square(), EdgeF1()
    hint = drawn(edges(picture))
    batch = {"edges": hint, "image": picture}
    rows = metric.look(picture, batch)
    assert rows["f1"].item() == rows["real"].item() == 1
    assert metric.look(picture.roll(1, 3), batch)["f1"].item() == 1
    assert metric.look(picture.roll((4, 4), (2, 3)), batch)["f1"] < 0.5
    assert metric.look(torch.zeros_like(picture), batch)["f1"].item() == 0
    assert metric.compute({k: v.repeat(4) for k, v in rows.items()}, None)["edge_f1"].value == 1
    with pytest.raises(Refusal, match=r"reads the field 'edges'.*\+data\.fields\.edges=edges\.png"):
        metric.look(picture, {"image": picture})
