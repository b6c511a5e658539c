"""Tables: a person at a terminal sees one, a file gets plain lines."""

import sys

import pytest

from ldm.command import list as listing
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


def test_a_purpose_is_a_whole_sentence():
    assert listing.purpose("# @package _global_\n# One thing,\n# and another. More.\n# python x\n") == "One thing, and another."
    assert listing.purpose("# Pictures:  python evaluate.py x\n# ROOT: there\n") == "Pictures:  python evaluate.py x"
    assert listing.purpose("# As it is\n# python train.py x.\n") == "As it is"
    assert listing.purpose("a: 1\nb:\n  c:\n    _target_: ldm.sampler.ddim.DDIM\n") == ""  # a part's, not its own
    grid = listing.purpose("_target_: ldm.sampler.grid.Uniform\n")
    assert grid.startswith("Equal steps in t") and grid.endswith("equation 23).")


def test_every_choice_says_what_it_is():
    assert not [(group, name) for group in listing.groups()[:-1] for name, what in listing.choices(group) if not what]


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
