"""docs/benchmarks.md's table of one GPU, from benchmarks/lab.json:  python -m benchmarks.lab --page FILE

Nobody writes a figure there by hand; a row without one says so, with the command that measures it.
"""

import json
from pathlib import Path

from benchmarks.lab_list import ROWS
from benchmarks.page import PAGE, line

KEPT = Path(__file__).with_name("lab.json")
BEGIN, END = "<!-- lab: begin -->", "<!-- lab: end -->"
HEAD = ["what", "bar", "measured", "of the peer's time", "of the peak", "memory, ours and the peer's", "card, torch, commit"]
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}  # dense bfloat16 FLOP/s, as the maker says


def read(file):
    """-> rows by name; none where there is no such file."""
    return json.loads(file.read_text()) if file.is_file() else {}


def merge(found):
    """Takes finished measurements of a GPU over into benchmarks/lab.json."""
    real = {name: row for name, row in found.items() if row.get("finished") and not row.get("dry")}
    KEPT.write_text(json.dumps(read(KEPT) | real, indent=1) + "\n")


def page_rows(found):
    """-> the cells of each row of the list."""
    return [cells(name, found.get(name)) for name in ROWS]


def cells(name, row):
    """-> of one row."""
    spec = ROWS[name]
    if row is None:
        command = f"`python -m benchmarks.lab --rows {name} --seconds {spec.limit}`"
        return [spec.what, spec.bar, f"not measured: {command}", "", "", "", ""]
    number = row["numbers"][spec.number]
    said = ", ".join(f"{value:.3g} {key}" for key, value in row["numbers"].items())
    ratio = (
        f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), outputs apart {row['apart']:.0e}" if "ratio" in row else ""
    )
    share, peak = "", PEAK.get(row["card"])
    if peak and spec.flops:
        work = spec.flops * number if spec.number == "images/s" else spec.flops / number
        share = f"{work / peak:.0%}"
    memory = " and ".join(f"{size / 2**30:.1f}" for size in row["memory"]) + " GiB" if any(row.get("memory", ())) else ""
    return [spec.what, spec.bar, said, ratio, share, memory, f"{row['card']}, {row['torch']}, {row['commit']}"]


def text(found):
    """-> the page's table."""
    return "\n".join([line(HEAD), line(["---"] * len(HEAD)), *(line(row) for row in page_rows(found))])


def write_page():
    """Puts the table between the page's two marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text(read(KEPT))}\n{END}{after}")
