"""What a person sees while a run trains."""

import re
import sys

import pytest

from helpers.training import diffusion, small, trainer
from ldm.training.callback.bar import Bar, summary
from ldm.training.run import quiet


def run(emoji_root, tmp_path, bar, steps=8, stage=None, **how):
    stage = stage or diffusion()
    trained = trainer(tmp_path, steps, callbacks=[bar], enable_checkpointing=False, **how)
    trained.fit(stage, small(emoji_root))
    return trained, stage


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_log_file_has_the_summary_and_a_line_at_each_quarter(emoji_root, tmp_path, capsys, accumulate):
    run(emoji_root, tmp_path, Bar(), accumulate_grad_batches=accumulate, val_check_interval=4 * accumulate)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["stage", "data", "length", "device", "written"]
    assert "told label" in lines[0] and "69 train, 16 val samples at 8 px, 8 a step" in lines[1] and str(tmp_path) in lines[4]
    said = [line for line in lines if line.startswith("step ")]
    assert [line.split(",")[0] for line in said] == [f"step {n} of 8" for n in (2, 4, 6, 8)]
    assert all(re.search(r"loss \d.*images/s, \d:\d\d:\d\d left$", line) for line in said)
    assert ("val/loss" in said[0], "val/loss" in said[2]) == (False, True) and said[-1].endswith("0:00:00 left")


def test_the_loss_is_that_of_the_step_however_it_is_accumulated(emoji_root, tmp_path, capsys):
    """Lightning divides each micro-batch's loss by their number; what is shown is of the size that is logged."""
    shown = []
    for accumulate in (1, 4):
        run(emoji_root, tmp_path, Bar(summary=False), steps=1, accumulate_grad_batches=accumulate)
        shown.append(float(re.search(r"loss ([\d.]+)", capsys.readouterr().out)[1]))
    assert 0.5 < shown[0] / shown[1] < 2


def test_a_terminal_has_a_bar_that_keeps_its_total(emoji_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(emoji_root, tmp_path, Bar(refresh_rate=1, summary=False))
    told = capsys.readouterr()
    assert "8/8" in told.err and "images/s" in told.err and "loss" in told.err and not told.out


def test_parameters_are_counted(emoji_root, tmp_path):
    trained, stage = run(emoji_root, tmp_path, Bar(summary=False), steps=1)
    counted = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    assert f"{counted / 1e3:.3g}k parameters are trained, 0 frozen" in summary(trained, stage)[0]


def test_lightnings_tips_are_not_shown(capfd):
    quiet()
    import pytorch_lightning as pl

    pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    told = capfd.readouterr()
    assert "Tip" not in told.err + told.out and "GPU available" not in told.err + told.out
