"""AdamW with moments in 8 bits: what is asked of bitsandbytes, whose optimizer calls no hooks, and what is said without it."""

import sys

import pytest
import torch

from helpers.training import diffusion, small, trainer
from ldm.build import build
from ldm.compose import compose_config
from ldm.errors import Refusal
from ldm.training.optimizer.adamw_8bit import adamw_8bit
from ldm.training.plan import moments

NODE = {"_target_": "ldm.training.optimizer.adamw_8bit.adamw_8bit", "_partial_": True, "lr": 1e-2}


def test_a_run_goes_on_to_the_bit_and_at_the_rate_that_is_said(bitsandbytes, emoji_root, tmp_path):
    def legs(*steps, rates=(1e-2, 1e-2)):
        checkpoint = None
        for leg, rate in zip(steps, rates):
            stage = diffusion()
            stage.optimizer = build(NODE | {"lr": rate})
            run = trainer(tmp_path, leg, enable_checkpointing=False)
            run.fit(stage, small(emoji_root), ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / f"{leg}.ckpt"
            run.save_checkpoint(checkpoint, weights_only=False)
        return stage.state_dict(), run.optimizers[0]

    (whole, _), (again, _), (_, other) = legs(4), legs(2, 4), legs(2, 4, rates=(1e-2, 5e-3))
    start = diffusion().state_dict()
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    assert any(not torch.equal(x, start[name]) for name, x in whole.items())
    assert other.param_groups[0]["lr"] == 5e-3, "settings are the present ones, not the checkpoint's"


def test_without_it_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(Refusal, match=r"pip install 'ldm\[eight_bit\]', or optimizer=adamw"):
        adamw_8bit([{"params": [torch.nn.Parameter(torch.ones(2))]}])


def test_a_plan_counts_its_moments():
    plain, eight = (build(compose_config("train", [f"optimizer={name}"]).optimizer) for name in ("adamw", "adamw_8bit"))
    assert (moments(plain), moments(eight)) == (8, 2)
