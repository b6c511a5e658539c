"""docs/benchmarks.md, whose tables the benchmarks write row by row."""

from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def put(section, head, row, keys=1):
    """Puts a row into the table below `## section`, in the place of the row with the same first `keys` cells, or at its end.

    Raises:
        ValueError: the page has no such section with a table of this head.
    """
    lines = PAGE.read_text().split("\n")
    start = lines.index(f"## {section}")
    top = lines.index(line(head), start)
    end = next(i for i in range(top, len(lines)) if not lines[i].startswith("|"))
    own = line(row[:keys])
    place = next((i for i in range(top + 2, end) if lines[i].startswith(own)), None)
    if place is None:
        lines.insert(end, line(row))
    else:
        lines[place] = line(row)
    PAGE.write_text("\n".join(lines))


def line(cells):
    """-> | a | b |"""
    return f"| {' | '.join(cells)} |"
