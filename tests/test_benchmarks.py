"""The benchmarks run, on networks far less wide: ours and the peer's put out the same, which is asked before any timing."""

import json
import sys
from argparse import Namespace

import pytest

from benchmarks import finetuning, lab, lab_page, lab_rows, sampling, steps
from benchmarks.lab_list import ROWS
from benchmarks.lab_page import BEGIN, END, KEPT, read, text
from benchmarks.page import PAGE

PLAIN = {
    "device": "cpu",
    "dtype": "float32",
    "batch": 1,
    "rounds": 1,
    "minutes": 0.0,
    "compile": False,
    "bf16": False,
    "tell": None,
}


def asked(part, **settings):
    return Namespace(**{"network": "SD1.5", "tell": None} | PLAIN | settings, part=part, steps=2)


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


@pytest.mark.slow
def test_drawing_by_xl_is_diffusers():
    assert sampling.measure("ddim", 8, asked(16, network="SDXL")).apart < 1e-3


# ---- the lab


def test_the_page_holds_what_was_measured_and_says_what_was_not():
    """Figures of a GPU are written by benchmarks/lab.py alone."""
    page = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert page.strip() == text(read(KEPT)), "python -m benchmarks.lab --page benchmarks/lab.json writes it"
    assert read(KEPT).keys() <= ROWS.keys() and all(row["finished"] for row in read(KEPT).values())
    for name in ROWS.keys() - read(KEPT).keys():
        assert f"not measured: `python -m benchmarks.lab --rows {name} " in page


def lab_with(child, folder, monkeypatch, *words):
    """The command, whose processes run `child` in the place of a row."""
    monkeypatch.setattr(lab, "command", lambda name, _, asked: [sys.executable, "-c", child, name, str(asked.out)])
    monkeypatch.setattr("sys.argv", ["lab", "--out", str(folder), "--begin", str(folder), *words])
    lab.main()
    return json.loads((folder / "lab.json").read_text())


WRITES = """
import json, pathlib, sys, time
row = {"ratio": 0.5, "numbers": {"images/s": 3.0}}
pathlib.Path(sys.argv[2], f"{sys.argv[1]}.part.json").write_text(json.dumps(row))
"""


def test_rows_go_on_from_what_was_measured_and_leave_what_they_have_when_their_time_is_up(tmp_path, monkeypatch, capsys):
    measured = lab_with(WRITES, tmp_path, monkeypatch, "--rows", "kl-encode", "--dry")
    assert measured["kl-encode"]["finished"] and measured["kl-encode"]["ratio"] == 0.5
    both = ("--rows", "kl-encode,kl-decode", "--dry", "--seconds", "1")
    cut = lab_with(f"{WRITES}\ntime.sleep(60)", tmp_path, monkeypatch, *both)
    assert cut["kl-encode"] == measured["kl-encode"], "measured before"
    assert not cut["kl-decode"]["finished"] and "stopped after" in cut["kl-decode"]["error"]
    failed = lab_with("raise SystemExit('no card')", tmp_path, monkeypatch, "--rows", "kl-step", "--dry")
    assert "no card" in failed["kl-step"]["error"] and len(failed) == 3
    assert "0.500 of the peer's time | images/s 3" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part.json")) and not (tmp_path / "kl-encode.log").exists()


def test_only_finished_measurements_of_a_card_are_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_page, "KEPT", tmp_path / "kept.json")
    lab_page.merge({"a": {"finished": True, "dry": False}, "b": {"finished": True, "dry": True}, "c": {"finished": False}})
    assert read(tmp_path / "kept.json").keys() == {"a"}
    row = {"numbers": {"images/s": 200.0}, "card": "NVIDIA H200", "torch": "2", "commit": "c", "memory": [2**30, 2**31]}
    cells = lab_page.cells("sd2-512", row)
    assert cells[2] == "200 images/s" and cells[4] == "49%" and cells[5] == "1.0 and 2.0 GiB"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl-encode", "kl-decode", "kl-step", "loop", "emoji", "sd2-512"])
def test_a_row_runs(name, tmp_path):
    lab_rows.run(name, 60, True, tmp_path, tmp_path)
    assert json.loads((tmp_path / f"{name}.part.json").read_text())["numbers"]
