"""Where a training picture is cut and whether it is mirrored, and what a network such as SDXL is told of that."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from ldm.data.order.order import generator
from ldm.data.shard.decode import View

AUGMENT = 2**32 + 2  # a stream of random numbers
CROP = ("crop_top", "crop_left")
SIZES = ("original_height", "original_width", *CROP, "target_height", "target_width")
MOST = 2**31  # a number beyond it, or NaN, is no size

middle = cache(View)  # the views that are not random


def cut(position: int, height: int, width: int, crop: str, flip: float, seed: int) -> View:
    """What of a picture is looked at, a function of (seed, position).

    Args:
        position: the sample's place in training.
        height, width: pixels of the result.
        crop: "center" or "random".
        flip: the share of the samples that are mirrored, in [0, 1].
        seed: of both.
    """
    if crop == "center" and not flip:
        return middle(height, width)
    v, u, mirror = generator(seed, position, AUGMENT).random(3).tolist()
    v, u = (v, u) if crop == "random" else (0.5, 0.5)
    return View(height, width, v, u, mirror < flip)


def told(number: Callable[[str], float], view: View, cut_ahead: bool) -> list[int]:
    """What SDXL is told of a picture (https://arxiv.org/abs/2307.01952, 2.2): SIZES, in pixels, 0 where one is not known.

    Args:
        number: name -> that number of the sample, NaN where it is not said.
        cut_ahead: the sample itself says where it was cut, as latents that were made ahead do.
    """
    width, height = number("width"), number("height")
    original = [number(f"original_{side}") for side in ("height", "width")]
    known = 0 < width < MOST and 0 < height < MOST
    corner = [number(side) for side in CROP] if cut_ahead else view.corner(int(width), int(height)) if known else (0, 0)
    return [*(int(n) if abs(n) < MOST else 0 for n in (*original, *corner)), view.height, view.width]
