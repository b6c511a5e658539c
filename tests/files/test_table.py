"""Tables: a person at a terminal sees one, a file gets plain lines."""

import sys

import pytest

from ldm.command import list as listing
from ldm.command.list import groups, listed, purpose
from ldm.evaluation.protocol import write_numbers
from ldm.files.table import show

ROWS = [("a", "[red]the first[/red]"), ("longer", "")]
NUMBERS = {"fid": {"value": 12.34, "error": 0.5, "protocol": {}}, "kid": {"value": 0.5, "protocol": {}, "note": "few pictures"}}


def test_a_file_gets_plain_lines(capsys):
    show(("name", "what"), ROWS)
    assert capsys.readouterr().out == "a       [red]the first[/red]\nlonger\n"
    show(("name", "what"), ROWS[:1], headed=True)
    assert capsys.readouterr().out == "name  what\na     [red]the first[/red]\n"
    show(("name", "what", "never said"), [(*row, "") for row in ROWS], headed=True)
    assert capsys.readouterr().out == "name    what\na       [red]the first[/red]\nlonger\n", "a column of nothing is left out"


@pytest.mark.parametrize("looks", [True, False])
def test_a_person_sees_a_table(looks, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: looks)
    monkeypatch.setattr(sys, "argv", ["ldm list", "guidance"])
    listing.main()
    said = capsys.readouterr().out
    assert ("what it is" in said) == looks == ("\u2502" in said) and "cfg" in said and "interval" in said
    show(("name", "what"), ROWS)
    assert "[red]the first[/red]" in capsys.readouterr().out


@pytest.mark.parametrize("looks", [True, False])
def test_numbers_and_groups_are_tables_for_a_person_and_lines_for_a_file(looks, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: looks)
    write_numbers(NUMBERS, tmp_path)
    said = capsys.readouterr().out
    assert ("\u2502" in said) == ("value" in said) == looks and "12.34 \u00b1 0.5" in said and "few pictures" in said
    assert looks or said.splitlines()[0] == "fid  12.34 \u00b1 0.5"
    monkeypatch.setattr(sys, "argv", ["ldm list"])
    listing.main()
    said = capsys.readouterr().out
    assert ("\u2502" in said) == ("heun" in said or "dpmpp" in said) == looks and "objective/time" in said


def test_a_purpose_is_a_whole_sentence():
    """A config's first line, where a sentence ends there; what a sentence needs, where it does not; no command."""
    assert purpose("# @package _global_\n# One thing,\n# and another. More.\n# python x\n") == "One thing, and another."
    assert purpose("# Pictures:  python evaluate.py x\n# ROOT: there\n") == "Pictures:  python evaluate.py x"
    assert purpose("# As it is\n# python train.py x.\n") == "As it is"
    assert purpose("a: 1\nb:\n  c:\n    _target_: ldm.sampler.ddim.DDIM\n") == "", "a part's, not its own"
    grid = purpose("_target_: ldm.sampler.grid.Uniform\n")
    assert grid.startswith("Equal steps in t") and grid.endswith("equation 23).")
    rows = {name: said for group in groups() for name, said in listed(group).items()}
    assert not [name for name, said in rows.items() if not said or said.rstrip().endswith((",", " of", " and"))]
