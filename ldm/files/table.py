"""Tables and bars: drawn where a person looks at a terminal, plain lines where the output goes into a file or a pipe."""

import os
import sys
from collections.abc import Sequence


def show(header: Sequence[str], rows: Sequence[Sequence[str]], headed: bool = False) -> None:
    """Prints rows of text in columns, without the columns that are empty; plain lines have the header too where `headed`."""
    filled = [i for i, column in enumerate(zip(*rows)) if any(column)]
    names, *cells = [[row[i] for i in filled] for row in (header, *rows)]
    if not seen():
        return lines(plain([names, *cells] if headed else cells))
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*names)
    for row in cells:
        table.add_row(*map(Text, row))  # square brackets in them are no markup
    Console(file=sys.stdout).print(table)


def seen() -> bool:
    """Whether a person looks at what is printed."""
    return sys.stdout.isatty()


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text -> lines, two blanks between their columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def lines(said: Sequence[str]) -> None:
    """Prints lines; `| head` may stop reading them."""
    try:
        print("\n".join(said), flush=True)
    except BrokenPipeError:  # what Python flushes on its way out goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def once_a_minute() -> None:
    """Where no terminal is, bars of long work are written once a minute."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # which tqdm reads as it is imported
