"""What was brought from elsewhere:  ldm cache   lists it;  ldm cache clear [NAME ...]   removes it, all of it without a name"""

import argparse
import sys
from collections.abc import Sequence

from ldm.errors import Refusal
from ldm.files.table import show
from ldm.interop.cache import clear, entries, home


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints each model's key, size, day and sources, or removes some."""
    parser = argparse.ArgumentParser(prog="ldm cache", description=__doc__)
    parser.add_argument("doing", nargs="?", choices=["list", "clear"], default="list")
    parser.add_argument("names", nargs="*", help="keys, or what models were brought from: sdxl, hf://ORG/NAME, a file")
    options = parser.parse_args(arguments)
    if options.doing == "clear":
        try:
            gone = clear(options.names)
        except Refusal as error:
            sys.exit(f"error: {error}")
        print(f"{len(gone)} models are gone from {home()}")
        return
    there = list(entries())
    rows = [
        (folder.name, f"{size / 1e9:7.2f} GB", note["made"][:10], note["licence"], ", ".join(note["places"]) or "unknown")
        for folder, note, size in there
    ]
    if rows:
        show(("key", "size", "day", "licence", "from"), rows)
    print(f"{len(there)} models, {sum(size for *_, size in there) / 1e9:.2f} GB, in {home()}")
