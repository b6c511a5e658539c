"""The rows of benchmarks/lab.py: what each is, its bar, and how long it takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        what: in words. bar: what is wanted of it, on an H200 where it is absolute.
        number: of `numbers`, which one the bar is of.
        limit, least: seconds at most, and under which it is not begun.
        flops: of one picture, in training or drawing, 2 for a multiplication and an addition (research: FlopCounterMode).
    """

    what: str
    bar: str
    number: str
    limit: int = 300
    least: int = 60
    flops: float = 0.0


# FLOP a picture, forward and backward: docs/speed.md has them by the same count.
ROWS = {
    "emoji": Row(
        "`train.py experiment=emoji/text trainer=gpu`, batch 32", "5 s to the 10th step, then 100 steps/s", "steps/s", 120, 30
    ),
    "emoji-graph": Row("the same with `callback=[checkpoint,ema,bar,graph]`", "100 steps/s", "steps/s", 120, 30),
    "loop": Row("the same steps in a bare loop", "what the first row has 0.98 of", "steps/s", 120, 30),
    "quickstart": Row("`python quickstart.py`", "60 s", "seconds", 240, 60),
    "sd2-512": Row("SD2 512 x 512, train step on latents, batch 32, compiled", "200 images/s", "images/s", 480, 120, 2408.7e9),
    "sd2-256": Row("SD2 256 x 256, batch 128", "960 images/s", "images/s", 480, 120, 539.3e9),
    "dit-xl-2": Row("DiT-XL/2, 256 tokens, batch 64", "700 images/s", "images/s", 400, 120, 711.7e9),
    "dit-xl-2-graphs": Row("the same, launched as CUDA graphs", "700 images/s", "images/s", 400, 120, 711.7e9),
    "sdxl-1024": Row(
        "SDXL 1024 x 1024, batch 4 (both networks and their states lie in memory)", "25 images/s", "images/s", 560, 240, 20230.8e9
    ),
    "kl-encode": Row("KL-f8, 512 x 512 encoded, batch 8, bfloat16", "1 / 1.1", "images/s", 120, 30, 1116.7e9),
    "kl-decode": Row("the same decoded", "1 / 1.1", "images/s", 120, 30, 2514.5e9),
    "kl-step": Row("KL-f8, 256 x 256, training step (L1, KL, AdamW), batch 8", "1 / 1.5", "images/s", 180, 40, 3 * 894.9e9),
    "sd1.5-draw": Row("SD1.5 512 x 512, 50 steps, guided, batch 1, graphs", "0.25 s", "seconds", 300, 90, 100 * 803.3e9),
    "sdxl-draw": Row("SDXL 1024 x 1024, 30 steps, guided, batch 1, graphs", "1.5 s", "seconds", 400, 150, 60 * 6761.2e9),
}
