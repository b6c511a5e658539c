"""Tables: a person at a terminal sees one, a file gets plain lines."""

import sys

import pytest

from ldm.command import list as listing
from ldm.command.table import show

ROWS = [("a", "[red]the first[/red]"), ("longer", "")]


def test_a_file_gets_plain_lines(capsys):
    show(("name", "what"), ROWS)
    assert capsys.readouterr().out == "a       [red]the first[/red]\nlonger\n"
    show(("name", "what"), ROWS[:1], headed=True)
    assert capsys.readouterr().out == "name  what\na     [red]the first[/red]\n"


@pytest.mark.parametrize("looks", [True, False])
def test_a_person_sees_a_table(looks, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: looks)
    monkeypatch.setattr(sys, "argv", ["ldm list", "guidance"])
    listing.main()
    said = capsys.readouterr().out
    assert ("what it is" in said) == looks == ("\u2502" in said) and "cfg" in said and "interval" in said
    show(("name", "what"), ROWS)
    assert "[red]the first[/red]" in capsys.readouterr().out
