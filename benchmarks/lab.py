"""One command for a GPU that is there for minutes: each row of the list in a process of its own, written down as it goes.

    python -m benchmarks.lab                                        the rows, and what is known of each
    python -m benchmarks.lab --rows sd2-512,kl-encode --seconds 300 --out runs/lab
    python -m benchmarks.lab --rows all --dry                       the same code on a CPU, shrunken, in some minutes
    python -m benchmarks.lab --page runs/lab/lab.json               what was measured, into benchmarks/lab.json and the page

A row that OUT/lab.json, or --begin's, has measured on this card already is left out (--again). What a row compiled is kept in
OUT, at most 6 files of 15 MiB, and read again from there or from --begin. A row whose time is up leaves the rounds it has.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks.lab_page import KEPT, merge, read, write_page

ROOT = Path(__file__).parent.parent
CACHE = 15 * 2**20  # bytes of one file that is brought home
CACHES = 6  # so many files
QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def main():
    """Measures, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="names with commas between, or all")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all of them together")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    parser.add_argument("--begin", type=Path, default=Path("runs/lab"), help="a folder that an earlier call wrote")
    parser.add_argument("--dry", action="store_true", help="on a CPU, shrunken: whether it works")
    parser.add_argument("--again", action="store_true", help="also rows that are measured")
    parser.add_argument("--page", type=Path, help="takes over this file's measurements, and writes docs/benchmarks.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        from benchmarks import lab_rows  # which imports torch and diffusers

        lab_rows.run(asked.child, asked.seconds, asked.dry, asked.out, asked.begin)
    elif asked.page:
        merge(read(asked.page))
        write_page()
    elif asked.rows is None:
        print(table(read(KEPT)))
    else:
        measure(asked)


def measure(asked):
    """All rows that were asked for, one after the other, and the table."""
    from benchmarks.lab_list import ROWS

    names = list(ROWS) if asked.rows == "all" else asked.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"--rows {','.join(unknown)}: there are {', '.join(ROWS)}.")
    asked.out.mkdir(parents=True, exist_ok=True)
    file, end = asked.out / "lab.json", time.monotonic() + asked.seconds
    found = read(file) or read(asked.begin / "lab.json")
    write(file, found)
    for name in names:
        card = machine()
        if not asked.again and found.get(name, {}).get("finished") and found[name].get("card") == card["name"]:
            print(f"{name}: measured before", flush=True)
            continue
        left = min(end - time.monotonic(), ROWS[name].limit)
        if left < ROWS[name].least and not asked.dry:
            print(f"{name}: {left:.0f} s are left, it takes {ROWS[name].least} s at least", flush=True)
            continue
        print(f"{name}: at most {left:.0f} s", flush=True)
        result = one(name, left, asked)
        facts = {"card": card["name"], "driver": card["driver_version"], "before": card, "after": machine()}
        found = read(file) | {name: {**result, **facts, "dry": asked.dry, "commit": commit(), "date": str(date.today())}}
        write(file, found)
    print(table(found, names))


def one(name, seconds, asked):
    """A row in a process of its own -> what it wrote; of one that was cut, its last word."""
    part = asked.out / f"{name}.part.json"
    part.unlink(missing_ok=True)
    start = time.time()
    where = {"cwd": ROOT, "env": {**os.environ, "LAB_STARTED": str(start)}, "start_new_session": True}
    log = asked.out / f"{name}.log"
    with log.open("w") as out:
        child = subprocess.Popen(command(name, seconds, asked), stdout=out, stderr=subprocess.STDOUT, **where)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            code = f"stopped after {seconds:.0f} s"
            child.wait()
    result = read(part) | {"seconds": round(time.time() - start, 1)}
    part.unlink(missing_ok=True)
    if code == 0:
        log.unlink()
        return {**result, "finished": True}
    tail = log.read_text(errors="replace").splitlines()[-15:]
    print("\n".join(tail), flush=True)
    return {**result, "finished": False, "error": f"{code}: {tail[-1] if tail else ''}"}


def command(name, seconds, asked):
    """-> that of a row's process."""
    words = ["--child", name, "--seconds", str(seconds), "--out", str(asked.out), "--begin", str(asked.begin)]
    return [sys.executable, "-m", "benchmarks.lab", *words, *(["--dry"] if asked.dry else [])]


def machine():
    """-> the card's name, driver and state; a CPU's where there is none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"name": "CPU", "driver_version": ""}
    return dict(zip(QUERY, map(str.strip, line.split(","))))


def commit():
    """-> the code's version, where git is there to say it."""
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return said.stdout.strip()


def write(file, found):
    """All of it, or nothing."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(found, indent=1) + "\n")
    half.replace(file)


def table(found, names=None):
    """-> a line for each row: what was measured, or that it was not."""
    from benchmarks.lab_list import ROWS

    lines = []
    for name in names or ROWS:
        row = found.get(name, {})
        ratio = f"{row['ratio']:.3f} of the peer's time" if "ratio" in row else ""
        cut = f"cut: {row['error'][:90]}" if row.get("error") else ""
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.get("numbers", {}).items())
        lines.append(f"{name:14s} {' | '.join(filter(None, (ratio, numbers, cut))) or 'not measured'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
