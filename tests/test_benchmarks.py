"""The benchmarks run, on networks far less wide: ours and the peer's put out the same, which is asked before any timing."""

from argparse import Namespace

import pytest

from benchmarks import finetuning, sampling, steps

PLAIN = {"device": "cpu", "dtype": "float32", "batch": 1, "rounds": 1, "minutes": 0.0, "compile": False, "bf16": False}


def asked(part, **settings):
    return Namespace(**PLAIN | settings, part=part, steps=2)


@pytest.mark.parametrize(
    ("name", "part"),
    [("SD1.5", 20), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("SD2", 16), ("SDXL", 16), ("DiT-XL/2", 18)))],
)
def test_a_training_step_is_diffusers(name, part):
    assert steps.measure(name, 32 if name == "DiT-XL/2" else 8, asked(part)).apart < 1e-4


def test_a_training_step_in_bfloat16_is_diffusers():
    assert steps.measure("SD1.5", 8, asked(20, bf16=True)).apart < 5e-2


@pytest.mark.parametrize("name", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("controlnet", "drawing"))])
def test_fine_tuning_is_diffusers(name):
    assert finetuning.measure(name, 8, asked(20)).apart < 1e-4


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_drawing_is_diffusers(name):
    assert sampling.measure(name, 8, asked(20)).apart < 1e-3
