"""Tables: drawn where a person looks at a terminal, plain lines where the output goes into a file or a pipe."""

import os
import sys
from collections.abc import Sequence


def show(header: Sequence[str], rows: Sequence[Sequence[str]], headed: bool = False) -> None:
    """Prints rows of text in columns; plain lines have the header too if they are to be `headed`."""
    if not sys.stdout.isatty():
        return lines(plain([header, *rows] if headed else rows))
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header)
    for row in rows:
        table.add_row(*map(Text, row))  # square brackets in them are no markup
    Console(file=sys.stdout).print(table)


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
